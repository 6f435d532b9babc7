"""Calls from many threads, from torch's own pools, after a fork, and after a call that failed: the bits of a call made alone."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastattn

pytest.importorskip("fastattn._native", reason="the C++ core is not built")

ROOT = Path(__file__).resolve().parent.parent
Job = Callable[[], list[Tensor]]


def _attention_job(seed: int, shape: tuple[int, ...], dtype: torch.dtype, **options: object) -> Job:
    """Output and gradients of one call; shape is (B, H, Hk, Nq, Nk, D)."""
    batch, heads, key_heads, rows, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = ((batch, heads, rows, dim), (batch, key_heads, keys, dim), (batch, key_heads, keys, dim))
    inputs = [torch.randn(size, generator=generator).to(dtype) for size in sizes]

    def job() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = fastattn.attention(*leaves, implementation="cpu", **options)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    return job


def _rows_job(seed: int, rows: int, columns: int, dtype: torch.dtype) -> Job:
    """Feed-forward and norm with their gradients."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((rows, columns), (2 * columns + 3, columns), (columns, 2 * columns + 3), (columns,))
    inputs = [torch.randn(size, generator=generator).to(dtype) / 8 for size in sizes]

    def job() -> list[Tensor]:
        x, w_in, w_out, weight = (t.clone().requires_grad_() for t in inputs)
        y = fastattn.ffn(
            fastattn.rms_norm(x, (columns,), weight, implementation="cpu"), w_in, w_out, implementation="cpu"
        )
        return [y.detach(), *torch.autograd.grad(y.float().sum(), (x, w_in, w_out, weight))]

    return job


def _jobs() -> list[Job]:
    """Different lengths, dtypes and paths, so that threads which shared scratch or tile state would disturb each other."""
    return [
        _attention_job(0, (1, 2, 1, 67, 131, 24), torch.float32, causal=True),
        _attention_job(1, (2, 2, 2, 19, 200, 64), torch.bfloat16),
        _attention_job(2, (1, 4, 2, 3, 513, 40), torch.bfloat16, causal=True),
        _attention_job(3, (1, 1, 1, 129, 33, 80), torch.float16, dropout_p=0.2, rng_state=torch.tensor([5, 9])),
        _attention_job(4, (1, 3, 3, 45, 45, 7), torch.float64, window_size=(9, 3)),
        _rows_job(5, 70, 65, torch.float32),
        _rows_job(6, 3, 130, torch.bfloat16),
    ]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_python_threads(compiled: str, two_threads: None) -> None:
    jobs = _jobs()
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        turns = [(i * 5 + turn) % len(jobs) for turn in range(3) for i in range(len(jobs))]
        results = list(pool.map(lambda i: jobs[i](), turns))
    for i, result in zip(turns, results, strict=True):
        assert _equal(result, alone[i]), f"job {i}"


def test_one_graph_differentiated_by_several_threads(compiled: str, two_threads: None) -> None:
    q, k, v = (torch.randn(1, 2, 77, 24, requires_grad=True) for _ in range(3))
    out = fastattn.attention(q, k, v, causal=True, implementation=compiled)
    upstream = [torch.randn_like(out) for _ in range(6)]

    def gradient(dout: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))

    alone = [gradient(dout) for dout in upstream]
    with ThreadPoolExecutor(3) as pool:
        assert all(map(_equal, pool.map(gradient, upstream), alone))


def test_inside_torchs_intra_op_pool(compiled: str, two_threads: None) -> None:
    """Nested: a kernel called by a thread that is itself a piece of a parallel loop takes all its work alone."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    signature = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    jobs = _jobs()
    alone = [job() for job in jobs]
    results: dict[int, list[Tensor]] = {}

    def piece(begin: int, end: int, _: object) -> None:
        results.update((i, jobs[i]()) for i in range(begin, end))

    count, grain = ctypes.c_int64(len(jobs)), ctypes.c_int64(1)
    assert library.torch_parallel_for(ctypes.c_int64(0), count, grain, signature(piece), None) == 0
    assert all(_equal(results[i], alone[i]) for i in range(len(jobs)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_inside_torchs_inter_op_pool(compiled: str) -> None:
    @torch.jit.script
    def forked(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        futures = [
            torch.jit.fork(
                torch.ops.fastattn.attention_forward,
                q[i : i + 1],
                k,
                v,
                None,
                None,
                None,
                0.3,
                -1,
                0,
                5,
                0.0,
                0.0,
                None,
            )
            for i in range(q.size(0))
        ]
        return [torch.jit.wait(future)[0] for future in futures]

    q, k, v = torch.randn(5, 2, 70, 24), torch.randn(1, 2, 75, 24), torch.randn(1, 2, 75, 24)
    for i, out in enumerate(forked(q, k, v)):
        expected = fastattn.attention(q[i : i + 1], k, v, softmax_scale=0.3, causal=True, implementation=compiled)
        assert torch.equal(out, expected)


def _child(connection: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)  # OpenMP's pool does not survive a fork: DataLoader's workers do the same
    connection.send_bytes(pickle.dumps([[x.double().numpy() for x in job()] for job in _jobs()]))
    connection.close()
    os._exit(0)


def test_after_a_fork(compiled: str, two_threads: None) -> None:
    """The parent has used every kernel and its threads; the child inherits their scratch."""
    alone = [job() for job in _jobs()]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(sender,))
    process.start()
    assert receiver.poll(60), "the child hangs"
    results = pickle.loads(receiver.recv_bytes())
    process.join(60)
    for result, expected in zip(results, alone, strict=True):
        assert _equal([torch.from_numpy(x) for x in result], [x.double() for x in expected])
    assert all(map(_equal, [job() for job in _jobs()], alone)), "the parent afterwards"


class _Attended(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Tensor:
        q = torch.randn(1, 2, 40 + index, 16, generator=torch.Generator().manual_seed(index))
        return fastattn.attention(q, q, q, causal=True, implementation="cpu")


def test_in_dataloader_workers(two_threads: None) -> None:
    dataset = _Attended()
    alone = [dataset[i] for i in range(len(dataset))]
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert _equal(list(loader), alone)


def test_a_call_without_memory_leaves_nothing_behind() -> None:
    """Scratch that the system refuses is an error of that call, on any thread; the next call is as good as before."""
    code = """
import resource, torch, fastattn
q, k = torch.randn(1, 2, 20, 64), torch.randn(1, 2, 20, 64)
long = torch.zeros(1, 1, 1, 64).expand(1, 2, 16_000_000, 64)
torch.set_num_threads(2)
before = fastattn.attention(q, k, k, causal=True, implementation="cpu")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
for threads in (1, 2, 2, 1):
    torch.set_num_threads(threads)
    try:
        fastattn.attention(q, long, long, implementation="cpu")
    except (MemoryError, RuntimeError) as error:
        # From 2.15 on torch makes a RuntimeError of every exception that leaves an operator.
        assert isinstance(error, MemoryError) or "std::bad_alloc" in str(error), error
    else:
        raise SystemExit("no error")
    assert torch.equal(fastattn.attention(q, k, k, causal=True, implementation="cpu"), before)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FASTATTN_ISA": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_a_process_limited_to_an_instruction_set(isa: str) -> None:
    """FASTATTN_ISA decides from the first call on, without the pybind11 module, and gives the bits of forcing it later."""
    from fastattn import _native

    if isa not in _native.available_isas():
        pytest.skip(f"this machine has no {isa}")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import pickle, warnings
warnings.simplefilter("error")
import torch
import test_concurrency as t
from fastattn.ops import _library
assert _library.current_isa() == {isa!r}
sys.stdout.buffer.write(pickle.dumps([[x.double().numpy() for x in job()] for job in t._jobs()]))
"""
    environment = os.environ | {"FASTATTN_ISA": isa, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    before = _native.current_isa()
    _native.set_isa(isa)
    try:
        expected = [job() for job in _jobs()]
    finally:
        _native.set_isa(before)
    for result, alone in zip(pickle.loads(done.stdout), expected, strict=True):
        assert _equal([torch.from_numpy(x) for x in result], [x.double() for x in alone])
