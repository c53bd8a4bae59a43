"""What things should cost, for 2 CPU cores and float32 (inference: float64). A target that is missed stays in the ledger."""

from __future__ import annotations

from typing import NamedTuple

COMPILED, EAGER = "IVON, compiled", "IVON, eager"
PROBLEMS = ("Kronecker quadratic", "logistic regression")
PAIRS = ("Gamma, Poisson", "Beta, Bernoulli", "NormalGamma, Normal")


class Target(NamedTuple):
    """A bound on a figure that some table measures."""

    key: str
    words: str
    bound: float
    stretch: float | None = None
    at_least: bool = False

    def kept(self, value: float, bound: float) -> bool:
        return value >= bound if self.at_least else value <= bound

    @property
    def bounds(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {self.bound:g}" + (f" ({sign} {self.stretch:g})" if self.stretch is not None else "")


def _step(key: str, words: str, compiled: float, eager: float, stretch: float) -> tuple[Target, Target]:
    return (
        Target(f"{key}: {COMPILED}", f"{words}, compiled", compiled, stretch),
        Target(f"{key}: {EAGER}", f"{words}, eager", eager),
    )


_WORK, _10M, _SMALL = "optimizer work", "10M in 76 tensors", "0.27M in 59 tensors"
_DEFAULT, _KEPT = "default allocator", "allocator that keeps pages"

TARGETS: tuple[Target, ...] = (
    *_step("training step, GPT 5.8M, 2048 tokens", "training step / AdamW (fused): GPT 5.8M, 2048 tokens", 1.03, 1.08, 1.01),
    *_step("training step, ResNet-20, batch 128", "training step / AdamW (fused): ResNet-20, batch 128", 1.03, 1.08, 1.01),
    *_step("training step, GPT 5.8M, 512 tokens", "training step / AdamW (fused): GPT 5.8M, 512 tokens", 1.07, 1.3, 1.03),
    *_step(f"{_WORK}, {_10M}, {_DEFAULT}", f"{_WORK} / AdamW (fused): {_10M}", 3.5, 15, 2.0),
    *_step(f"{_WORK}, {_SMALL}, {_DEFAULT}", f"{_WORK} / AdamW (fused): {_SMALL}", 2.5, 5, 1.5),
    Target(
        f"{_WORK}, {_10M}, {_DEFAULT}: {COMPILED}, against the published", f"published IVON / compiled: {_DEFAULT}", 20, 35, True
    ),
    Target(f"{_WORK}, {_10M}, {_KEPT}: {COMPILED}, against the published", f"published IVON / compiled: {_KEPT}", 4, 8, True),
    Target(f"memory: {COMPILED}", "peak memory / parameters: compiled", 3.0),
    Target(f"memory: {EAGER}", "peak memory / parameters: eager", 3.0),
    Target(f"memory: {COMPILED}, low memory", 'peak memory / parameters: compiled, memory="low"', 2.0),
    Target(f"memory: {EAGER}, low memory", 'peak memory / parameters: eager, memory="low"', 2.0),
    *(
        target
        for size in (_10M, _SMALL)
        for target in (
            Target(f"compilation, cold: {size}", f"seconds to compile, cold: {size}", 25),
            Target(f"compilation, warm: {size}", f"seconds to compile, warm: {size}", 4),
            Target(f"recompiles: {size}", f"recompiles over an lr schedule: {size}", 0),
        )
    ),
    *(
        Target(f"prediction, {work}{how}", f"64-draw prediction / 64 forwards: {work}{how}", bound, stretch)
        for work, bound, stretch in (("ResNet-20, batch 16", 1.2, 1.1), ("MLP 0.86M, batch 32", 5, 2.5))
        for how in ("", ", compiled")
    ),
    Target("inference, ridge", "posterior / scikit-learn: ridge, 100,000 x 100", 1.3),
    Target("inference, logistic regression", "posterior / scikit-learn: logistic regression, 50,000 x 50", 3.0),
    Target("inference, logistic regression, error", "error of that logistic posterior, in 1e-6", 1.0),
    Target("inference, Gaussian process", "posterior / scikit-learn: GP classification, 500 points", 2.0),
    *(
        Target(f"inference, conjugate, {pair}", f"1,000 conjugate problems one by one / in one call: {pair}", 50, at_least=True)
        for pair in PAIRS
    ),
    *(
        Target(
            f"loading, {optimizer}, the recipe, images in {where}",
            f"ResNet-20 step / tensors in memory: {optimizer}, {where}",
            1.05,
        )
        for optimizer in ("adamw", "ivon")
        for where in ("memory", "PNG files")
    ),
    Target("memory, folder", "peak memory for a folder of 10 GB, in GB", 1.5),
    Target("report", "seconds of a report on 50,000 test images", 20),
    *(
        Target(f"binding, {workload}: {name}", f"{name} / context: {workload}", 1.02)
        for workload in ("ResNet-20, batch 32", "perceptron 0.64M, batch 32")
        for name in ("closure", "train and step", "attach")
    ),
    Target("traffic: IVON, same noise", "traffic of two processes / AdamW: same noise", 1.01),
    Target("traffic: IVON, noise per rank", "traffic of two processes / AdamW: noise per rank", 2.0),
    Target("EVON beside SOAP: EVON", "EVON / SOAP: 12 layers of 256", 1.2),
    Target("EVON beside SOAP: EVON, phasing", "EVON with phasing / SOAP: 12 layers of 256", 1.2),
    Target("SAM beside two steps: SAM", "SAM / two steps of SGD: ResNet-20, batch 128", 1.05),
    Target("SAM beside two steps: bSAM", "bSAM / two steps of AdamW: ResNet-20, batch 128", 1.05),
    *(
        Target(f"covariance, {problem}: EVON / IVON", f"nats from the exact Gaussian, EVON / IVON: {problem}", 1.0)
        for problem in PROBLEMS
    ),
    *(
        Target(f"per example, {work}: {what}", f"{what} / training epoch: {work}", bound)
        for work, bounds in (("MLP 0.86M, 1,000 examples", (5, 1)), ("ResNet-20, 128 examples", (8, 1.4)))
        for what, bound in zip(("variances of all 10 outputs", "variance of one output"), bounds, strict=True)
    ),
    *(
        Target(f"linearized prediction, {work}: {what}", f"{what}, linearized / laplace-torch: {work}", 1.0)
        for work in ("MLP 0.86M, 32 examples", "ResNet-20, 8 examples")
        for what in ("time", "memory")
    ),
    Target("sensitivity, ResNet-20: scores, vjp_jvp, newton", "scores of all examples / training epoch: ResNet-20", 12.0),
    Target("sensitivity, MLP 0.86M: scores, vjp_jvp, newton", "scores of all examples / training epoch: MLP 0.86M", 12.0),
    Target("sensitivity, memory: KiB an example more", "KiB of memory for each example more: scores of ResNet-20", 1.0),
    Target("self-influence: ours / kronfluence", "self-influence, ours / kronfluence's scores: MLP 0.86M", 0.2),
    Target("leaving out: 1 - rank correlation", "1 - rank correlation of leave-one-out losses, estimated and true", 0.1),
    Target("leaving out: off cross-validation", "LOO NLL off that of 10-fold cross-validation, digits", 0.1),
    Target("leaving out: grid steps", "grid steps from the best weight decay, by LOO NLL", 1.0),
    *(
        target
        for corpus in ("Shakespeare", "standard library")
        for target in (
            Target(f"perplexity, {corpus}: diagonal", f"perplexity, best diagonal variational / tuned AdamW: {corpus}", 0.97),
            Target(f"perplexity, {corpus}: structured", f"perplexity, best structured / better of SOAP and Muon: {corpus}", 1.0),
            Target(f"perplexity, {corpus}: diagonal, averaged", f"averaged perplexity / at the mean, diagonal: {corpus}", 1.005),
            Target(
                f"perplexity, {corpus}: structured, averaged", f"averaged perplexity / at the mean, structured: {corpus}", 1.005
            ),
        )
    ),
    Target("language: our loop / nanoGPT's", "seconds a step, our loop / nanoGPT's, both AdamW: GPT of 0.37 million", 1.03),
    Target("language: averaged / forwards", "averaged perplexity over 8 draws / one forward: GPT of 0.37 million", 8.5),
    Target("merging: ours / plain", "merging checkpoints / reading and writing them: 4 of 540 MB", 1.5),
    Target("merging: ours / mergekit", "bayesrule merge / mergekit-yaml, linear, whole commands: 4 of 540 MB", 1.2),
    Target("merging, memory", "growth of memory while merging 4 checkpoints of 540 MB, in MB", 600),
    *(
        Target(
            f"adaptation, {workload}: posterior_correction",
            f"step of an adaptation / plain step on as many examples: {workload}",
            2.2,
        )
        for workload in ("MLP 0.86M", "ResNet-20")
    ),
    *(
        Target(f"points below retraining: {case}", f"points of accuracy below retraining, posterior correction: {case}", 1.0)
        for case in (
            "Adult, linear: add a tenth",
            "Adult, linear: remove a tenth",
            "Adult, linear: prior of 50 becomes 5",
            "USPS, 100 units: add class 9",
            "USPS, 100 units: remove class 9",
            "USPS, 100 units: remove a tenth",
            "USPS, 100 units: prior of 50 becomes 5",
            "digits in five tasks",
        )
    ),
    Target("VOGN, ResNet-20, 128 examples: time", "VOGN / SGD step: ResNet-20, batch 128", 2.5),
    Target("VOGN, ResNet-20, 128 examples: memory", "peak memory, VOGN / SGD step: ResNet-20, batch 128", 2.0),
)
