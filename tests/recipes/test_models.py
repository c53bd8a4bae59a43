"""Models: shapes for both image sizes, and a start that the seed decides."""

import pytest
import torch

from bayesrule.recipes.models import MODELS, build


@pytest.mark.parametrize("size", [8, 28])
@pytest.mark.parametrize("name", MODELS)
def test_gives_logits_and_keeps_no_batch_statistics(name, size):
    images = torch.randn(3, 1, size, size)
    model = build(name, images, classes=7)
    assert model(images).shape == (3, 7)
    assert not list(model.buffers())
    torch.testing.assert_close(model(images)[:1], model(images[:1]))


def test_resnet20_has_the_size_of_the_paper():
    count = sum(p.numel() for p in build("resnet20", torch.zeros(1, 3, 32, 32), 10).parameters())
    assert 0.26e6 < count < 0.28e6


def test_the_seed_decides_the_start_and_leaves_the_global_generator_alone():
    images = torch.zeros(1, 1, 8, 8)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build("mlp", images, 2, seed)[1].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="unknown model 'resnet'; did you mean 'resnet20'"):
        build("resnet", torch.zeros(1, 1, 8, 8), 2)
