"""Optimizers by name: which settings they take, what a setting may be, and how it is written."""

import math

import pytest
import torch
from torch import nn

from bayesrule.recipes.gpt import GPT, Shape
from bayesrule.recipes.optimizers import OPTIMIZERS, RESERVED, TEXT_OPTIMIZERS, assignments, settle


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_is_an_argument_and_every_default_arrives(name):
    choice = OPTIMIZERS[name]
    arguments = set(choice.arguments)
    assert set(choice.options) - {"beta1", "beta2"} <= arguments - RESERVED and set(choice.settings) <= set(choice.options)
    optimizer = choice.make(nn.Linear(2, 2), settle(name, {}, 100), seed=3)
    (group,) = optimizer.param_groups
    for key, value in choice.settings.items():
        found = group["betas"][1] if key == "beta2" else group[key]
        assert found == (value * 100 if key == "ess" else value)
    assert choice.variational == ("ess" in optimizer.defaults) and all(
        optimizer.defaults.get(k, v) == v for k, v in choice.fixed.items()
    )


@pytest.mark.parametrize("name", [name for name, choice in OPTIMIZERS.items() if "beta1" in choice.options])
def test_the_decays_are_two_settings(name):
    default = OPTIMIZERS[name].arguments["betas"].default
    for given, expected in (({"beta1": 0.5}, (0.5, default[1])), ({"beta2": 0.7}, (default[0], 0.7)), ({}, default)):
        required = {"ess": 5.0, "hess_init": 1.0} if "ess" in OPTIMIZERS[name].options else {}
        optimizer = OPTIMIZERS[name].make(nn.Linear(2, 2), {"lr": 0.1, **required, **given})
        assert tuple(optimizer.param_groups[0]["betas"]) == expected


def test_the_seed_is_of_the_draws():
    weights = []
    for seed in (0, 0, 1):
        model = nn.Linear(3, 1)
        nn.init.ones_(model.weight)
        nn.init.ones_(model.bias)
        optimizer = OPTIMIZERS["ivon"].make(model, settle("ivon", {"lr": 1.0}, 10), seed)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        weights.append(model.weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("ivon", {}, {"ess": 50.0, "lr": 0.2}),
        ("ivon", {"ess": 7.0, "lr": None}, {"ess": 7.0, "lr": 0.2}),
        ("sgd", {"momentum": 0.0, "weight_decay": None}, {"lr": 0.03, "momentum": 0.0, "weight_decay": 5e-4}),
        ("adamw", {"beta1": 0.8}, {"lr": 1e-3, "weight_decay": 0.01, "beta2": 0.999, "beta1": 0.8}),
    ],
)
def test_what_is_given_overrides_the_defaults(name, given, expected):
    found = settle(name, given, 50)
    assert {key: found[key] for key in expected} == expected
    assert None not in found.values()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("adagrad", {}, "unknown optimizer 'adagrad'; .*there are: adam, adamw, bayesbinn, bsam, dropout, evon, iblr, ivon"),
        ("sgd", {"ess": 5.0}, r"sgd has no setting ess \(got 5.0\); its settings are lr, momentum, .*weight_decay"),
        ("sgd", {"momentun": 5.0}, "did you mean 'momentum'"),
        ("ivon", {"seed": 5}, "ivon has no setting seed"),
        ("ivon", {"noise": 5}, "ivon has no setting noise"),
        ("torch-sgd", {"maximize": True}, "torch-sgd has no setting maximize"),
        ("adamw", {"betas": (0.9, 0.99)}, "adamw has no setting betas .* its settings are .*beta1, beta2"),
    ],
)
def test_settings_that_there_are_not_are_named(name, given, message):
    with pytest.raises(ValueError, match=message):
        settle(name, given, 1)


BAD = [
    *[("lr", value) for value in (-1.0, "fast", math.nan)],
    *[("weight_decay", -0.1), ("beta2", 1.5), ("beta1", "x"), ("ess", 0.0), ("ess", math.nan), ("hess_init", -1.0)],
    *[("mc_samples", 0), ("mc_samples", 1.5), ("momentum", -1.0), ("clip_radius", -1.0), ("hess_approx", "no")],
    *[("memory", "tiny"), ("compile", "perhaps"), ("eps", -1.0)],
]
TORCHS = {("lr", math.nan), ("beta1", "x"), ("compile", "perhaps")}  # which torch's own do not check in one way


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        (name, setting, value)
        for name, choice in OPTIMIZERS.items()
        for setting, value in BAD
        if setting in choice.options and not (name.startswith("torch") and (setting, value) in TORCHS)
        if (name, setting) != ("bayesbinn", "mc_samples")  # 0 is its mean
    ],
)
def test_values_that_there_are_not_are_one_line(name, setting, value):
    choice = OPTIMIZERS[name]
    with pytest.raises(ValueError, match=choice.title) as refusal:
        choice.make(nn.Linear(2, 2), settle(name, {setting: value}, 10))
    assert "\n" not in str(refusal.value)


def test_a_message_names_the_optimizer_once():
    with pytest.raises(ValueError, match="lr must be") as refusal:
        OPTIMIZERS["ivon"].make(nn.Linear(2, 2), settle("ivon", {"lr": -1.0}, 10))
    assert str(refusal.value).count("IVON") == 1


def test_a_question_mark_is_followed_by_no_semicolon():
    with pytest.raises(ValueError, match="did you mean") as refusal:
        settle("sgd", {"momentun": 5.0}, 1)
    assert "?;" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("lr=1e-3", 0.001), ("lr = 5", 5), ("lr=-1.5", -1.5), ("x=inf", math.inf), ("x=Inf", math.inf), ("x=1_000", 1000)],
        *[("x=true", True), ("x=False", False), ("x=none", None), ("x=None", None)],
        *[("x=gradsq", "gradsq"), ("x='gradsq'", "gradsq"), ("x=a=b", "a=b"), ("x=2 3", "2 3")],
    ],
)
def test_an_assignment_is_a_value(text, value):
    ((key, found),) = assignments([text]).items()
    assert key in ("lr", "x") and found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["lr"], r"--set takes key=value, got 'lr'; for example --set lr=0.1"),
        (["lr="], "--set takes key=value, got 'lr='"),
        (["=3"], "--set takes key=value, got '=3'"),
        ([""], "--set takes key=value, got ''"),
        (["lr=1", "beta1=0.5", "lr=2"], "--set gives lr twice, 1 and 2; drop one"),
        (["lr=[1, 2]"], r"--set lr takes a number, true, false or a word, got \[1, 2\]"),
        (["lr={}"], "--set lr takes a number"),
        (["lr=1j"], "--set lr takes a number"),
        (["lr=b'x'"], "--set lr takes a number"),
    ],
)
def test_what_is_no_assignment_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        assignments(texts)


def test_an_assignment_is_never_run(tmp_path):
    assert assignments([f"x=open({str(tmp_path / 'a')!r}, 'w')"])["x"].startswith("open(")
    assert assignments(["x=" + "(" * 500])["x"].startswith("((") and not list(tmp_path.iterdir())


# Of text


@pytest.mark.parametrize("name", TEXT_OPTIMIZERS)
def test_defaults_for_text_are_settings_and_arrive(name):
    choice = TEXT_OPTIMIZERS[name]
    settings = settle(name, {}, 100, TEXT_OPTIMIZERS, averaged=8)
    assert set(settings) <= set(choice.options)
    assert settings.get("ess", 1000.0) == 1000.0 and settings.get("gradsq_scale", 8.0) == 8.0
    model = GPT(20, Shape(layers=1, heads=2, width=8, context=6))
    first = {"hess_init": {name: torch.ones_like(p) for name, p in model.named_parameters()}}
    optimizer = choice.make(model, settings | (first if settings.get("hess_init") == "data" else {}))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert optimizer.param_groups[0]["lr"] == settings["lr"]


@pytest.mark.parametrize(("given", "rate"), [({}, 0.01), ({"adamw_lr": 0.5}, 0.5)], ids=str)
def test_of_evon_the_matrices_inside_and_the_rest_have_rates_of_their_own(given, rate):
    settings = settle("evon", given, 100, TEXT_OPTIMIZERS)
    inner, *rest = TEXT_OPTIMIZERS["evon"].groups(GPT(20, Shape(layers=2, heads=2, width=8, context=6)), settings)
    assert [name.split(".", 2)[-1] for name, _ in inner["params"][:4]] == [
        "attention.inward.weight",
        "attention.outward.weight",
        "widen.weight",
        "outward.weight",
    ]
    assert [(group["adamw"], group["lr"], group["weight_decay"]) for group in rest] == [(True, rate, 0.1), (True, rate, 0.0)]
