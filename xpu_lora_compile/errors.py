"""Every error of the package: what was wanted, what came, and what to do about it."""

from __future__ import annotations

from typing import Any


def counted(number: int, noun: str) -> str:
    """Return a number of things: "1 name", "2 names"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class LoraError(Exception):
    """The base of all errors that this package raises on purpose: `LoraError(where, wanted, got, remedy)`.

    Args:
        where: the op, option, module or file that is concerned.
        wanted: what it takes.
        got: what came instead.
        remedy: a sentence that says what to do.
    """

    # Without an __init__ of its own, so that Dynamo can trace a `raise`, and pickle can copy the error.

    def __str__(self) -> str:
        where, wanted, got, remedy = self.args
        # Dynamo adds the place in the user's code to the first argument.
        where, place, trace = where.partition("\n\nfrom user code")
        return f"{where}: wanted {wanted}; got {got}. {remedy}{place}{trace}"

    def __repr__(self) -> str:
        # What Dynamo prints of an error that it caught while tracing.
        return f"{type(self).__name__}: {self}"


class ContractError(LoraError, ValueError):
    """A call that breaks the contract of the ops; see the table in `xpu_lora_compile.ops`."""


class ShapeError(ContractError):
    """A tensor has the wrong number of dimensions, or two sizes disagree."""


class DtypeError(ContractError, TypeError):
    """A tensor has a dtype that the op does not take."""


class DeviceError(ContractError):
    """The tensors of one call are on different devices."""


class SliceError(ContractError):
    """A slice does not lie inside the output, or its size is not the width of its weights."""


class LostGradientError(LoraError, RuntimeError):
    """An op cannot carry a gradient: it writes in place, or the gradient is that of a gradient."""


class OptionError(LoraError, ValueError):
    """A mode or an option that neither this backend nor Inductor knows, or a value of the wrong type."""


class KernelError(LoraError, ValueError):
    """A kernel that was asked for does not exist, or cannot run a call."""


class BenchError(LoraError, RuntimeError):
    """A contender computes something else than the reference, or what a benchmark needs is not there."""


class DeadAdapterError(LoraError):
    """A call that adds LoRA has no influence on what the model returns, or an attached module makes no such call.

    Its attribute `report` is the `Report` that would have been returned.
    """

    report: Any


class VerificationError(LoraError, AssertionError):
    """A compiled call computes something else than it should, by more than rounding explains; or there is none.

    Its attribute `verification` is the `Verification` that would have been returned.
    """

    verification: Any


class FactoryError(LoraError, ValueError):
    """What a command was told to explain cannot be imported or called, or is not a model with its inputs."""


class ArtifactError(LoraError, ValueError):
    """A model that cannot be exported, or a file that cannot be served by this process."""


class AttachError(LoraError):
    """A model, or one of its modules, that LoRA cannot be attached to."""


class BatchError(LoraError, ValueError):
    """The batch that ran has another number of rows than the adapters named by `bank.use`."""


class UnprovedRowsError(BatchError, AssertionError):
    """Nobody can tell which rows of a layer belong to which sequence of the batch, so that none gets an adapter."""

    # An AssertionError, since Dynamo hands these on as they are.


class OutsideBlockError(LoraError, RuntimeError):
    """The model runs during a `use` block in a thread or task that has none, or a backward pass has left its block."""


class UnreachedLayerError(LoraError, RuntimeError):
    """A parent read the weight of a layer without calling it, so that its LoRA was left out."""


class CopiedModelError(LoraError, RuntimeError):
    """A copied or unpickled model has LoRA layers, but no bank."""


class AdapterError(LoraError):
    """An adapter cannot be loaded, dropped or used; the bank is as it was before the call."""


class AdapterFileError(AdapterError):
    """A file of the adapter's folder is missing, unreadable, truncated or malformed."""


class UnsupportedAdapterError(AdapterError):
    """The adapter uses features of PEFT that this package does not have; all of them are named."""


class UnmatchedTensorError(AdapterError):
    """A tensor of the adapter belongs to no module of the bank, or a module's tensor is missing."""


class AdapterShapeError(AdapterError):
    """A tensor of the adapter does not fit the module it belongs to."""


class RankError(AdapterError):
    """The adapter's rank is higher than the bank's `max_rank`."""


class NonFiniteWeightError(AdapterError):
    """A tensor of the adapter holds NaN or infinity, which could spread to other rows of a batch."""


class DuplicateAdapterError(AdapterError):
    """The bank already holds an adapter of this name."""


class UnknownAdapterError(AdapterError, KeyError):
    """The bank holds no adapter of this name."""

    # KeyError would print the repr of its arguments.
    __str__ = LoraError.__str__


class NoFreeSlotError(AdapterError):
    """Every slot of the bank is taken."""


class NoFreePageError(NoFreeSlotError):
    """A mixture of experts has too little room left for the experts of an adapter."""


class BankInUseError(AdapterError):
    """The bank is inside a `use` block that this call would disturb."""


def own_error(error: BaseException | None) -> LoraError | None:
    """Our own error that one of torch's was raised for: what is raised as Dynamo traces arrives inside one of its."""
    while error is not None and not isinstance(error, LoraError):
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return error
