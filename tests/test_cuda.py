"""The operators' tests once more on a GPU, and what only a GPU can show (``make test-cuda``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._pytree import tree_map_only

from mann_ext import LRUAMemory, _library, ops
from mann_ext._library import backend
from mann_ext.models import MANN
from tests import (
    test_content,
    test_coordinate_lstm,
    test_lrua,
    test_lstm,
    test_lstm_lrua,
    test_ntm,
    test_relu_pool,
)
from tests.samples import Sample, deferred_lrua_samples, lrua_samples

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("on_gpu"),
]


def moved(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of CPU tensors, computed on the GPU."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, lambda x: x.to(DEVICE), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda x: x.cpu(), function(*args, **kwargs))

    return run


class _Raw:
    """torch.ops.mann_ext, moved."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return moved(getattr(_RAW, name))


_RAW = torch.ops.mann_ext


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """The functions that the operators' tests call run on the GPU, on native kernels only."""
    with (
        backend("native"),
        mock.patch.object(test_lrua.ops, "lrua_scan", moved(ops.lrua_scan)),
        mock.patch.object(test_lrua.ops, "lrua_step", moved(ops.lrua_step)),
        mock.patch.object(test_ntm.ops, "ntm_scan", moved(ops.ntm_scan)),
        mock.patch.object(test_content.ops, "content_read", moved(ops.content_read)),
        mock.patch.object(test_lstm_lrua.ops, "lstm_lrua_scan", moved(ops.lstm_lrua_scan)),
        mock.patch.object(test_coordinate_lstm, "coordinate_lstm", moved(ops.coordinate_lstm)),
        mock.patch.object(test_lstm, "lstm_scan", moved(ops.lstm_scan)),
        mock.patch.object(test_relu_pool, "relu_pool", moved(ops.relu_pool)),
        mock.patch.object(test_lrua, "native_slots", _raw(test_lrua.native_slots)),
        mock.patch.object(test_lstm_lrua, "native_slots", _raw(test_lstm_lrua.native_slots)),
    ):
        yield


def _raw(slots: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """The same function with the raw operators it calls on the GPU."""

    def run(sample: Any) -> torch.Tensor:
        with mock.patch.object(torch.ops, "mann_ext", _Raw()):
            return slots(sample)

    return run


# The operators' own tests, unchanged.
test_float64 = test_lrua.test_native_equals_the_reference_in_float64
test_slots = test_lrua.test_native_chooses_the_same_slots_unforced
test_float32 = test_lrua.test_float32_error_is_at_most_twice_the_references_own
test_sixteen_bit = test_lrua.test_sixteen_bit_memory_is_rounded_every_step
test_derivatives = test_lrua.test_gradcheck_and_gradgradcheck
test_ties = test_lrua.test_ties_go_to_the_lowest_slot
test_nan_usage = test_lrua.test_nan_usage_counts_as_most_used
test_nan_key = test_lrua.test_nan_in_a_key_stays_in_its_batch_element
test_erased = test_lrua.test_erased_slots_receive_no_gradient
test_reset = test_lrua.test_no_gradient_crosses_a_reset
test_sharp = test_lrua.test_sharp_reads_stay_finite
test_steps = test_lrua.test_a_scan_is_a_loop_of_steps
test_any_shape = test_lrua.test_any_shape
test_ntm_float64 = test_ntm.test_native_equals_the_reference_in_float64
test_ntm_float32 = test_ntm.test_float32_error_is_at_most_twice_the_references_own
test_ntm_derivatives = test_ntm.test_gradcheck_and_gradgradcheck
test_ntm_nan = test_ntm.test_nan_in_any_input_ends_up_where_the_reference_has_it
test_ntm_huge = test_ntm.test_huge_values_stay_finite_in_float32
test_ntm_steps = test_ntm.test_a_scan_is_a_loop_of_single_steps
test_ntm_any_shape = test_ntm.test_any_shape
test_content_float64 = test_content.test_native_equals_the_reference_in_float64
test_content_float32 = test_content.test_float32_error_is_at_most_twice_the_references_own
test_content_sixteen_bit = test_content.test_sixteen_bit_keys_are_summed_in_float32
test_content_derivatives = test_content.test_gradcheck_and_gradgradcheck
test_cell_float64 = test_lstm_lrua.test_native_equals_the_reference_in_float64
test_cell_slots = test_lstm_lrua.test_native_chooses_the_same_slots_unforced
test_cell_float32 = test_lstm_lrua.test_float32_error_is_at_most_twice_the_references_own
test_cell_sixteen_bit = test_lstm_lrua.test_sixteen_bit_memory_is_rounded_every_step
test_cell_derivatives = test_lstm_lrua.test_first_and_second_derivatives
test_cell_one_output = test_lstm_lrua.test_the_gradient_of_one_output_alone
test_cell_reset = test_lstm_lrua.test_a_reset_forgets_everything_even_nan
test_coordinates_float64 = test_coordinate_lstm.test_float64_is_the_reference
test_coordinates_float32 = test_coordinate_lstm.test_float32_is_as_exact_as_the_reference_in_float32
test_coordinates_derivatives = test_coordinate_lstm.test_first_and_second_derivatives_by_weights
test_coordinates_lstm = test_coordinate_lstm.test_it_is_an_lstm_and_a_linear_layer
test_coordinates_empty = test_coordinate_lstm.test_no_coordinates_and_no_steps
test_lstm_values = test_lstm.test_values_and_gradients_are_those_of_the_loop
test_lstm_any_shape = test_lstm.test_odd_sizes
test_lstm_derivatives = test_lstm.test_first_and_second_derivatives
test_lstm_reset = test_lstm.test_a_reset_forgets_everything_even_nan
test_lstm_huge = test_lstm.test_huge_gates_saturate
test_lstm_nan = test_lstm.test_nan_and_infinity_end_up_where_the_loop_has_them
test_lstm_small = test_lstm.test_small_gates_keep_their_digits
test_pool_float = test_relu_pool.test_values_and_gradients_are_exactly_the_reference_s
test_pool_nan = test_relu_pool.test_nan_and_infinity_stay_what_they_are
test_pool_derivatives = test_relu_pool.test_first_and_second_derivatives
test_content_empty_mask = test_content.test_a_query_that_may_read_nothing_reads_zeros


@pytest.fixture
def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memories that would fit in shared memory are streamed as well."""
    monkeypatch.setenv("MANN_EXT_CUDA_REGIME", "streaming")


@pytest.mark.usefixtures("streaming")
class TestDeferredWrites:
    @pytest.mark.parametrize("form", ["chunks_of_2", "one_chunk"])
    @pytest.mark.parametrize(
        "sample", [*lrua_samples(), *deferred_lrua_samples()], ids=lambda s: s.name
    )
    def test_float64(self, sample: Sample, form: str) -> None:
        test_lrua.test_native_equals_the_reference_in_float64(sample, test_lrua.FORMS[form])

    test_float32 = staticmethod(
        test_lrua.test_float32_error_of_deferred_writes_is_at_most_twice_too
    )


class TestClusters:
    """Memories shared out between eight blocks."""

    @pytest.fixture(autouse=True)
    def cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if torch.cuda.get_device_capability()[0] < 9:
            pytest.skip("needs compute capability 9")
        monkeypatch.setenv("MANN_EXT_CUDA_REGIME", "cluster")

    @pytest.mark.parametrize("form", ["saved", "rolled_back", "every_3"])
    @pytest.mark.parametrize("sample", lrua_samples(), ids=lambda s: s.name)
    def test_float64(self, sample: Sample, form: str) -> None:
        test_lrua.test_native_equals_the_reference_in_float64(sample, test_lrua.FORMS[form])

    test_sixteen_bit = staticmethod(test_lrua.test_sixteen_bit_memory_is_rounded_every_step)
    test_slots = staticmethod(test_lrua.test_native_chooses_the_same_slots_unforced)
    test_sharp = staticmethod(test_lrua.test_sharp_reads_stay_finite)
    test_lstm_values = staticmethod(test_lstm.test_values_and_gradients_are_those_of_the_loop)
    test_lstm_reset = staticmethod(test_lstm.test_a_reset_forgets_everything_even_nan)


def paper_size(slots: int = 128, width: int = 40, steps: int = 20) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE, generator=generator)

    memory = 0.1 * normal(4, slots, width)
    weights = normal(4, 4, slots).softmax(-1)
    keys, gates = normal(steps, 4, 4, width).tanh(), normal(steps, 4, 4).sigmoid()
    return memory, weights, weights.sum(1), keys, gates, 10 * torch.ones_like(gates)


# Resident in one block and in eight, and streamed with writes at every step and deferred.
SIZES: list[tuple[int, dict[str, Any]]] = [
    (128, {}),
    (2_500, {}),
    (20_000, {}),
    (20_000, {"snapshot_every": 0, "chunk": 6}),
]
sizes = pytest.mark.parametrize(
    ("slots", "form"), SIZES, ids=["resident", "shared_out", "streamed", "deferred"]
)


def as_graph(
    run: Callable[[], list[torch.Tensor]],
) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
    """A CUDA graph of ``run``, and the tensors that a replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


def differentiated(inputs: tuple[torch.Tensor, ...], **form: Any) -> list[torch.Tensor]:
    learnt = [x.detach().requires_grad_() for x in inputs[3:]]
    output = _LRUA_SCAN(*inputs[:3], *learnt, **form)
    total = output.reads.sin().sum() + output.memory.sin().sum()
    return [*output, *torch.autograd.grad(total, learnt)]


_LRUA_SCAN = ops.lrua_scan


@sizes
def test_the_same_bits_every_time(slots: int, form: dict[str, Any]):
    inputs = paper_size(slots)
    first = differentiated(inputs, **form)
    for _ in range(3):
        torch.full((2**24,), float("nan"), device=DEVICE)  # what is not written would show
        for x, y in zip(first, differentiated(inputs, **form), strict=True):
            assert torch.equal(x, y)


@sizes
def test_nothing_waits_for_the_gpu(slots: int, form: dict[str, Any]):
    inputs = paper_size(slots)
    differentiated(inputs, **form)
    torch.cuda.set_sync_debug_mode("error")
    try:
        differentiated(inputs, **form)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@sizes
def test_a_cuda_graph_repeats_forward_and_backward(slots: int, form: dict[str, Any]):
    inputs = paper_size(slots)
    graph, captured = as_graph(lambda: differentiated(inputs, **form))
    inputs[3].neg_()
    graph.replay()
    for x, y in zip(captured, differentiated(inputs, **form), strict=True):
        assert torch.equal(x, y)


def coordinate_inputs(hidden: int) -> list[torch.Tensor]:
    """100,003 coordinates, more than the blocks that run at once have."""
    tensors = [x.to(DEVICE) for x in test_coordinate_lstm.inputs(5, 100_003, hidden, torch.float32)]
    return [tensors[0], *(tensor.requires_grad_() for tensor in tensors[1:])]


def of_coordinates(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    out = ops.coordinate_lstm(*tensors)
    return [out, *torch.autograd.grad(out.sin().sum(), tensors[1:])]


# 20 is known to the compiler; with 200 units nothing fits in shared memory.
@pytest.mark.parametrize("hidden", [20, 8, 200])
def test_coordinates_have_the_same_bits_every_time_and_wait_for_nothing(hidden: int):
    tensors = coordinate_inputs(hidden)
    first = of_coordinates(tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = []
        for _ in range(3):
            torch.full((2**24,), float("nan"), device=DEVICE)  # what is not written would show
            others.append(of_coordinates(tensors))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("hidden", [20, 8, 200])
def test_a_cuda_graph_repeats_coordinates(hidden: int):
    tensors = coordinate_inputs(hidden)
    graph, captured = as_graph(lambda: of_coordinates(tensors))
    tensors[0].neg_()
    graph.replay()
    assert all(map(torch.equal, captured, of_coordinates(tensors)))


def test_more_gradients_than_32_bits_count():
    steps, count = 2**11, 2**20 + 3
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free GPU memory")
    _, *weights = (x.to(DEVICE) for x in test_coordinate_lstm.inputs(1, 1, 2, torch.float32))
    gradients = torch.zeros(steps, count, device=DEVICE)  # more than 2^31 numbers
    gradients[-3:, -1] = 1.0
    made = ops.coordinate_lstm(gradients, *weights)
    expected = ops.coordinate_lstm(gradients[:, -2:].contiguous(), *weights)
    assert torch.equal(made[-2:], expected)
    assert made[-1] != made[-2]


def lstm_inputs(batch: int, hidden: int) -> list[torch.Tensor]:
    tensors = [x.to(DEVICE) for x in test_lstm.inputs(30, batch, 40, hidden, torch.float32)]
    return [tensor.requires_grad_() for tensor in tensors]


def of_lstm(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    output = ops.lstm_scan(*tensors)
    return [*output, *torch.autograd.grad(output.hidden.sin().sum(), tensors)]


# One block, clusters with one and with several elements of the batch, and streamed.
@pytest.mark.parametrize(("batch", "hidden"), [(40, 20), (16, 200), (300, 200), (16, 300)])
def test_an_lstm_has_the_same_bits_every_time_and_its_graph_repeats_it(batch: int, hidden: int):
    tensors = lstm_inputs(batch, hidden)
    first = of_lstm(tensors)
    for _ in range(3):
        torch.full((2**24,), float("nan"), device=DEVICE)  # what is not written would show
        assert all(map(torch.equal, first, of_lstm(tensors)))
    graph, captured = as_graph(lambda: of_lstm(tensors))
    with torch.no_grad():
        tensors[0].neg_()
    graph.replay()
    assert all(map(torch.equal, captured, of_lstm(tensors)))


@pytest.mark.parametrize("slots", [128, 20_000])
def test_a_cuda_graph_repeats_a_model_with_read_feedback(slots: int):
    torch.manual_seed(0)
    model = MANN(30, 5, 40, num_slots=slots, read_feedback=True, device=DEVICE)
    parameters, x = list(model.parameters()), torch.randn(6, 5, 30, device=DEVICE)

    def run() -> list[torch.Tensor]:
        y, _ = model(x)
        return [y, *torch.autograd.grad(y.sin().sum(), parameters)]

    graph, captured = as_graph(run)
    x.neg_()
    graph.replay()
    for a, b in zip(captured, run(), strict=True):
        torch.testing.assert_close(a, b)
    looped = MANN(30, 5, 40, num_slots=slots, read_feedback=True, fused=False, device=DEVICE)
    looped.load_state_dict(model.state_dict())
    torch.testing.assert_close(looped(x)[0], captured[0], rtol=1e-4, atol=1e-5)


def test_more_numbers_than_32_bits_count():
    slots, width = 2**25 + 3, 65
    if torch.cuda.mem_get_info()[0] < 6 * 2 * slots * width:
        pytest.skip("needs 26 GB of free GPU memory")
    memory = torch.zeros(1, slots, width, device=DEVICE, dtype=torch.bfloat16)
    key = torch.randn(1, 1, width, device=DEVICE)
    memory[0, -2] = key[0, 0].bfloat16()  # past 2^31 numbers
    weights = torch.zeros(1, 1, slots, device=DEVICE)
    usage = torch.ones(1, slots, device=DEVICE)
    usage[0, -1] = 0
    out = ops_step(memory, weights, usage, key, torch.zeros(1, 1, device=DEVICE), 30.0)
    assert out.memory[0, -1].float().allclose(key[0, 0], rtol=1e-2)  # written to the least used
    assert float(out.read_weights[0, 0, -2:].sum()) > 0.99
    assert out.reads[0, 0].allclose(key[0, 0], rtol=1e-2, atol=1e-2)


def test_more_numbers_than_32_bits_count_with_deferred_writes():
    slots, width = 2**25 + 3, 65
    if torch.cuda.mem_get_info()[0] < 3 * 4 * slots * width:
        pytest.skip("needs 26 GB of free GPU memory")
    memory = torch.zeros(1, 1, 1, device=DEVICE).expand(1, slots, width)
    keys = torch.randn(2, 1, 1, width, device=DEVICE)
    weights = torch.zeros(1, 1, slots, device=DEVICE)
    usage = torch.ones(1, slots, device=DEVICE)
    usage[0, -2:] = torch.tensor([0.1, 0.0])
    gates = torch.zeros(2, 1, 1, device=DEVICE)
    strengths = torch.full_like(gates, 30.0)
    with torch.no_grad():
        out = _LRUA_SCAN(memory, weights, usage, keys, gates, strengths, chunk=2)
    # Written to the least used, past 2^31 numbers.
    torch.testing.assert_close(out.memory[0, -2:], keys[:, 0, 0].flip(0))
    torch.testing.assert_close(out.reads[:, 0, 0], keys[:, 0, 0], rtol=1e-2, atol=1e-2)


def ops_step(memory: Any, weights: Any, usage: Any, key: Any, gate: Any, strength: float) -> Any:
    return _LRUA_STEP(memory, weights, usage, key, gate, torch.full_like(gate, strength))


_LRUA_STEP = ops.lrua_step


def test_the_module_trains_as_on_the_cpu():
    torch.manual_seed(0)
    memory = LRUAMemory(8, num_slots=32, slot_size=8, num_reads=2)
    x = torch.randn(6, 3, 8)
    expected, _ = memory(x)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in memory.parameters() if p.grad is not None]
    memory.zero_grad()
    got, _ = memory.to(DEVICE)(x.to(DEVICE))
    got.square().sum().backward()
    torch.testing.assert_close(got.cpu(), expected)
    for p, want in zip(memory.parameters(), grads, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad.cpu(), want, rtol=1e-4, atol=1e-5)


def test_the_library_has_every_cuda_kernel():
    names = {
        "lrua_scan", "ntm_scan", "content_read", "lstm_lrua_scan", "coordinate_lstm", "relu_pool",
        "lstm_scan",
    }  # fmt: skip
    names |= {f"{name}_backward" for name in names}
    assert names <= _library.native_operators("cuda")
