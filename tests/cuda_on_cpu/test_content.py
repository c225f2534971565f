"""content_read's CUDA kernels on the CPU: its own tests, and what parallel code can get wrong."""

from __future__ import annotations

import pytest
import torch

from mann_ext import ops
from mann_ext._library import backend
from tests import test_content
from tests.cuda_on_cpu import emulator
from tests.samples import Sample, content_samples

pytestmark = [emulator.needs_compiler, pytest.mark.usefixtures("cuda_on_cpu")]
FLOOR = 8 * torch.finfo(torch.float32).eps
SAMPLES = content_samples()
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name)

# The operator's own tests, unchanged.
test_float64 = test_content.test_native_equals_the_reference_in_float64
test_float32 = test_content.test_float32_error_is_at_most_twice_the_references_own
test_sixteen_bit = test_content.test_sixteen_bit_keys_are_summed_in_float32
test_derivatives = test_content.test_gradcheck_and_gradgradcheck
test_transforms = test_content.test_vmap_compile_and_opcheck
test_empty_mask = test_content.test_a_query_that_may_read_nothing_reads_zeros
test_permutation = test_content.test_permuting_slots_permutes_weights_and_leaves_reads


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def several(queries: int, width: int, value_width: int, slots: int, **options) -> Sample:
    args = (
        normal(2, queries, width), normal(2, slots, width),
        normal(2, slots, value_width) if value_width else None,
        normal(2, queries).exp() * options.pop("strength", 1.0), None,
    )  # fmt: skip
    return Sample(f"q{queries}k{width}v{value_width}n{slots}", args, options)


SHAPES = [
    several(1, 8, 0, 33),
    several(2, 40, 0, 300),
    several(4, 64, 24, 513),
    several(4, 16, 0, 600, similarity="dot", strength=0.25),
    several(9, 12, 8, 70),
    several(5, 264, 0, 40),
    several(2, 7, 300, 40),
    several(3, 520, 9, 20),
    several(4, 40, 0, 300, strength=200.0),
    several(4, 40, 0, 300, strength=-30.0),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sample", SHAPES, ids=lambda s: s.name)
def test_every_split_of_columns_queries_and_slots(sample: Sample, dtype: torch.dtype):
    stored = sample.to(dtype)
    exact = test_content.run(stored.to(torch.float64), "reference")
    got, plain = test_content.run(stored, "native"), test_content.run(stored, "reference")
    for mine, theirs, truth in zip(got, plain, exact, strict=True):  # float64: exact is plain
        scale = truth.norm().clamp_min(1.0)
        error, allowed = ((x.double() - truth).norm() / scale for x in (mine, theirs))
        assert error <= (1e-13 if dtype == torch.float64 else 2 * allowed + FLOOR)


@samples
def test_no_order_of_threads_changes_a_bit(sample: Sample, cuda_on_cpu):
    stored = sample.to(torch.float32)
    results = []
    for seed in range(4):
        cuda_on_cpu.cuda_on_cpu_set_seed(seed)
        results.append(test_content.run(stored, "native"))
    for result in results[1:]:
        for x, y in zip(result, results[0], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 40])
def test_any_number_of_multiprocessors(multiprocessors, cuda_on_cpu):
    cuda_on_cpu.cuda_on_cpu_set_multiprocessors(multiprocessors)
    sample = next(s for s in SAMPLES if s.name == "blocks")
    for got, want in zip(
        test_content.run(sample, "native"), test_content.run(sample, "reference"), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_large_and_masked_scores(similarity):
    queries, keys = 30 * normal(1, 4, 8), 30 * normal(1, 600, 8)
    mask = torch.zeros(1, 4, 600, dtype=torch.bool)
    mask[:, 0, 599] = mask[:, 1, :300] = mask[:, 2] = True
    strengths = torch.tensor([[1.0, 500.0, -500.0, 2.0]], dtype=torch.float64)
    args = (queries, keys, None, strengths, mask)
    with backend("reference"):
        want = ops.content_read(*args, similarity=similarity)
    got = ops.content_read(*args, similarity=similarity)
    torch.testing.assert_close(got.weights, want.weights)
    torch.testing.assert_close(got.reads, want.reads)
    assert (got.reads[0, 3] == 0).all()


def test_nan_in_the_memory_reaches_every_read():
    queries, keys = normal(1, 2, 8), normal(1, 600, 8)
    keys[0, 17, 3] = torch.nan
    reads, weights = ops.content_read(queries, keys)
    assert reads.isnan().all()
    assert weights.isnan().all()


def test_rows_that_are_not_aligned():
    queries, keys = normal(2, 3, 8).float(), normal(2, 70, 8).float()
    shifted = torch.empty(2 * 70 * 8 + 1)[1:].view(2, 70, 8).copy_(keys)
    assert shifted.data_ptr() % 16 != 0
    got, want = ops.content_read(queries, shifted), ops.content_read(queries, keys)
    torch.testing.assert_close(got, want)


def test_forward_is_two_launches_and_backward_three_at_most(cuda_on_cpu):
    queries, keys = (normal(2, n, 8).float().requires_grad_() for n in (3, 70))
    before = cuda_on_cpu.cuda_on_cpu_launches()
    reads, weights = ops.content_read(queries, keys)
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == 2
    (reads.sum() + weights.square().sum()).backward()
    assert cuda_on_cpu.cuda_on_cpu_launches() - before == 5
