"""``export_onnx``: writes an ``.onnx`` file after running it, optionally with sparse initializers."""

from __future__ import annotations

import copy
import inspect
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pruning_core.checkpoint import CheckpointError, write_atomically

TOLERANCE = 1e-4
LARGEST = 2**31 - 2**20
INDEX_BYTES = 8
Inputs = dict[str, Tensor]
Outputs = list[NDArray[Any]]


def export_onnx(
    model: nn.Module,
    example: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    sparse: bool = False,
) -> float:
    """Writes the model as ONNX and returns the difference between ONNX Runtime's and torch's outputs.

    That is the largest difference over the largest output (over 1 where that is smaller); more than 1e-4 is an error.
    ``example`` is the input, a tuple of them, or a dict of keyword arguments. With ``dynamic_batch`` the first axis of
    all inputs may have any length; lengths of 1 and 3 are tried. ``sparse=True`` stores weights that become smaller by
    it (fp32: more than two thirds of zeros) as ``sparse_initializer``, which ONNX Runtime reads to the same numbers and
    runs no faster. Not every other runtime reads it.
    """
    onnx = _installed()
    _check_size(model, path)
    model = copy.deepcopy(model).cpu().eval()
    inputs = _inputs(model, example)
    made = _exported(onnx, model, _rows(inputs, 2) if dynamic_batch else inputs, dynamic_batch)
    trials = [_rows(inputs, 1), _rows(inputs, 3)] if dynamic_batch else [inputs]
    dense = [_run(made, trial) for trial in trials]
    difference = max(_difference(_torch(model, trial), got) for trial, got in zip(trials, dense, strict=True))
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{path}: ONNX Runtime and torch must agree to {TOLERANCE}, got {difference:.1e}; not written"
        )
    if sparse:
        _thin(onnx, made)
        if any(not _same(got, _run(made, trial)) for trial, got in zip(trials, dense, strict=True)):
            raise CheckpointError(f"{path}: ONNX Runtime reads the sparse weights as other numbers; leave sparse out")
    write_atomically(path, lambda file: file.write(made.SerializeToString(deterministic=True)))
    return difference


def _installed() -> Any:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"export_onnx: needs {error.name}; pip install onnx onnxscript onnxruntime") from None
    return onnx


def _check_size(model: nn.Module, path: str | Path) -> None:
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(tensor.nbytes for tensor in tensors)
    if size > LARGEST:
        raise CheckpointError(f"{path}: an ONNX file holds at most 2 GiB, got {size:,} bytes; export it in parts")
    if any(tensor.dtype is torch.bfloat16 for tensor in tensors):
        raise CheckpointError(f"{path}: ONNX Runtime on a CPU does not run bfloat16; model.float() first")


def _inputs(model: nn.Module, example: Any) -> Inputs:
    """By name, whichever way they were given."""
    try:
        given = [example] if isinstance(example, Tensor) else example
        call = ((), given) if isinstance(given, Mapping) else (given, {})
        inputs = dict(inspect.signature(model.forward).bind(*call[0], **call[1]).arguments)
    except TypeError as error:
        raise ValueError(
            f"example: does not fit {type(model).__name__}.forward ({error}); give a dict of its inputs"
        ) from None
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"example: {name} must be a tensor, got {type(value).__name__}; give a dict of tensors")
    return {name: value.detach().cpu() for name, value in inputs.items()}


def _rows(inputs: Inputs, count: int) -> Inputs:
    """The first ``count`` rows of every input, over and over again where it has fewer."""
    for name, tensor in inputs.items():
        if not tensor.dim() or not len(tensor):
            raise ValueError(f"example: {name} has no rows; give at least one, or dynamic_batch=False")
    return {name: tensor[torch.arange(count) % len(tensor)] for name, tensor in inputs.items()}


def _exported(onnx: Any, model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> Any:
    shapes = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs} if dynamic_batch else None
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), _quiet():
        file = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                model,
                kwargs=dict(inputs),
                f=file,
                input_names=list(inputs),
                output_names=[name for name, _ in _leaves(_outputs(model, inputs))],
                dynamo=True,
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            do = "try dynamic_batch=False, or make it fit for torch.export" if dynamic_batch else "see torch.export"
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise CheckpointError(f"{type(model).__name__}: torch cannot export it ({reason}); {do}") from error
        return onnx.load(file)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on its own progress; what goes wrong is raised."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _outputs(model: nn.Module, inputs: Inputs) -> Any:
    with torch.no_grad():
        return model(**inputs)


def _leaves(outputs: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """``logits`` of a dict, ``output`` of a tensor, ``output_0_1`` of lists in lists; in the order of the exporter."""
    if isinstance(outputs, Tensor):
        return [(name if name and not name[0].isdigit() else f"output_{name}".rstrip("_"), outputs)]
    if isinstance(outputs, Mapping):
        inner = [(str(key), value) for key, value in outputs.items()]
    elif isinstance(outputs, list | tuple):
        inner = [(str(i), value) for i, value in enumerate(outputs)]
    elif outputs is None or isinstance(outputs, bool | int | float | str):
        inner = []
    else:
        kind = type(outputs).__name__
        raise ValueError(f"model: its output {name} must be tensors, got {kind}; wrap the model and return what counts")
    return [leaf for key, value in inner for leaf in _leaves(value, f"{name}_{key}" if name else key)]


def _torch(model: nn.Module, inputs: Inputs) -> Outputs:
    return [tensor.numpy() for _, tensor in _leaves(_outputs(model, inputs))]


def _run(made: Any, inputs: Inputs) -> Outputs:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
    return list(session.run(None, feed))


def _difference(expected: Outputs, got: Outputs) -> float:
    """The largest, over all outputs; infinite where one is finite and the other is not."""
    worst = 0.0
    for one, other in zip(expected, got, strict=True):
        if one.shape != other.shape:
            raise CheckpointError(f"ONNX: an output must be {list(one.shape)}, got {list(other.shape)}")
        finite = np.isfinite(one)
        if not np.array_equal(one[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
            return float("inf")
        if finite.any():
            scale = max(1.0, float(np.abs(one[finite]).max()))
            gap = np.abs(one[finite].astype(np.float64) - other[finite].astype(np.float64))
            worst = max(worst, float(gap.max()) / scale)
    return worst


def _same(one: Outputs, other: Outputs) -> bool:
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other, strict=True))


def _thin(onnx: Any, made: Any) -> None:
    """Stores initializers that become smaller so as values and their places."""
    kept = []
    for dense in made.graph.initializer:
        array = onnx.numpy_helper.to_array(dense)
        flat = array.reshape(-1)
        places = np.flatnonzero(flat)
        if array.ndim < 2 or len(places) * (array.itemsize + INDEX_BYTES) >= array.nbytes:
            kept.append(dense)
            continue
        values = onnx.numpy_helper.from_array(flat[places], dense.name)
        indices = onnx.numpy_helper.from_array(places.astype(np.int64), f"{dense.name}_places")
        made.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, array.shape))
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    onnx.checker.check_model(made)
