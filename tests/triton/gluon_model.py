"""A model of what a warp-specialised Gluon kernel runs on, for tests: the kernel's own source, executed by Python on torch tensors.

``run(kernel, grid, arguments, ...)`` calls the function under ``gluon.jit`` (and every jitted function that it calls) with ``gl``,
``tl``, ``mbarrier``, ``tma`` and the wgmma functions replaced by those below. Partitions are threads of which one runs at a
time; a seeded scheduler picks the next at every barrier. Modelled, each with the freedom that the hardware has:

* mbarriers: arrivals and bytes complete a phase, ``wait`` looks at its parity; more arrivals than the count are an error;
* TMA loads: bytes land and complete their barrier some time after the copy was started. ``eager`` writes them at the start, else
  just before the barrier completes: a reader that is not protected sees the wrong ones in one of the two;
* wgmma: operands in shared memory are read between start and wait. ``eager``: at the wait if copies are eager, else at the start;
* shared memory holds NaN until written, and what ordinary stores wrote may be read by TMA only after a fence.

If nothing can go on, it is a deadlock. Layouts, alignment and what the compiler makes of the source are not modelled.
"""

import random
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.jit import JITFunction


class Deadlock(RuntimeError):
    pass


class Fault(RuntimeError):
    """The kernel did what the hardware does not promise to get right."""


@dataclass
class Barrier:
    count: int = 0
    arrived: int = 0
    bytes: int = 0
    completed: int = 0

    def index(self, _: int) -> "Barrier":
        return self

    def arrive(self, count: int) -> None:
        self.arrived += count
        self._advance()

    def land(self, size: int) -> None:
        self.bytes -= size
        self._advance()

    def _advance(self) -> None:
        if self.arrived > self.count:
            raise Fault(f"{self.arrived} arrivals at a barrier of {self.count}")
        if self.arrived == self.count and self.bytes == 0:
            self.arrived, self.completed = 0, self.completed + 1


@dataclass
class Barriers:
    each: list[Barrier]

    def index(self, i: int) -> Barrier:
        return self.each[int(i)]


@dataclass
class Shared:
    data: Tensor
    dirty: set[int]  # addresses of buffers that ordinary stores wrote since the last fence

    dtype = property(lambda self: self.data.dtype)

    def index(self, i: int) -> "Shared":
        return Shared(self.data[int(i)], self.dirty)

    def reshape(self, shape: list[int]) -> "Shared":
        return Shared(self.data.view(shape), self.dirty)

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order), self.dirty)

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)
        self.dirty.add(self.data.data_ptr())


@dataclass
class Tiles:
    """A tensor as its descriptor shows it: boxes of ``block_shape``, zeros beyond the extents, stores cut to them."""

    base: Tensor
    block_shape: list[int]
    layout: Any = None

    dtype = property(lambda self: self.base.dtype)

    @property
    def block_type(self) -> Any:
        return types.SimpleNamespace(nbytes=torch.Size(self.block_shape).numel() * self.base.element_size())

    def _inside(self, corner: list[int]) -> tuple[slice, ...]:
        ends = zip(corner, self.block_shape, self.base.shape, strict=True)
        return tuple(slice(int(c), max(int(c), min(int(c) + n, limit))) for c, n, limit in ends)

    def load(self, corner: list[int]) -> Tensor:
        box, part = self.base.new_zeros(self.block_shape), self.base[self._inside(corner)]
        box[tuple(slice(n) for n in part.shape)] = part
        return box

    def store(self, corner: list[int], box: Tensor) -> None:
        part = self.base[self._inside(corner)]
        part.copy_(box[tuple(slice(n) for n in part.shape)])


@dataclass
class Pointer:
    """An address in the flat ``data``."""

    data: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.data, self.offset + offset)


@dataclass(eq=False)
class Product:
    """A wgmma that was started: ``acc + a b``, computed when it is waited for or, if not ``late``, at once."""

    a: Any
    b: Shared
    acc: Tensor
    result: Tensor | None = None

    def compute(self) -> None:
        if self.result is None:
            a = self.a.data if isinstance(self.a, Shared) else self.a
            self.result = self.acc + a.float() @ self.b.data.float()


@dataclass
class _Partition:
    call: Callable[[], None]
    ready: Callable[[], bool] = lambda: True
    resume: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    products: list[Product] = field(default_factory=list)
    done: bool = False


@dataclass
class Machine:
    """One program's multiprocessor. ``eager``: see the module. ``program``: its index in the grid."""

    program: int
    seed: int
    eager: bool
    dirty: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.copies: list[Callable[[], None]] = []
        self.paused = threading.Semaphore(0)
        self.current: _Partition = _Partition(lambda: None)
        self.error: BaseException | None = None

    def specialize(self, partitions: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        """gl.warp_specialize: run the partitions to their ends."""
        running = [_Partition(lambda f=function, a=args: f(*a)) for function, args in partitions]  # type: ignore[misc]
        for partition in running:
            threading.Thread(target=self._body, args=(partition,), daemon=True).start()
        while self.error is None and not all(partition.done for partition in running):
            able: list[Any] = [partition for partition in running if not partition.done and partition.ready()]
            able += self.copies
            if not able:
                self.error = Deadlock("every partition waits")
                break
            chosen = self.random.choice(able)
            if isinstance(chosen, _Partition):
                self.current = chosen
                chosen.resume.release()
                self.paused.acquire()
            else:
                self.copies.remove(chosen)
                chosen()
        if self.error is not None:
            raise self.error

    def _body(self, partition: _Partition) -> None:
        partition.resume.acquire()
        try:
            partition.call()
        except BaseException as error:  # handed to the thread of the test
            self.error = error
        partition.done = True
        self.paused.release()

    def pause(self, ready: Callable[[], bool]) -> None:
        """Let others go on until ``ready``."""
        partition = self.current
        partition.ready = ready
        self.paused.release()
        partition.resume.acquire()
        partition.ready = lambda: True

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Any:
        if dtype == gl.int64:
            return Barriers([Barrier() for _ in range(shape[0])])
        return Shared(torch.full(shape, float("nan"), dtype=dtype), self.dirty)

    def wait(self, barrier: Barrier, parity: int) -> None:
        self.pause(lambda: (barrier.completed & 1) != int(parity))

    def arrive(self, barrier: Barrier, count: int = 1) -> None:
        barrier.arrive(count)
        self.pause(lambda: True)

    def expect(self, barrier: Barrier, size: int) -> None:
        barrier.bytes += size
        barrier.arrive(1)

    def load(self, tiles: Tiles, corner: list[int], barrier: Barrier, target: Shared) -> None:
        def write() -> None:
            target.data.copy_(tiles.load(corner))

        def land() -> None:
            if not self.eager:
                write()
            barrier.land(tiles.block_type.nbytes)

        if self.eager:
            write()
        self.copies.append(land)

    def store(self, tiles: Tiles, corner: list[int], source: Shared) -> None:
        if source.data.data_ptr() in self.dirty:
            raise Fault("TMA reads shared memory that ordinary stores wrote, without a fence")
        tiles.store(corner, source.data)

    def product(self, a: Any, b: Shared, acc: Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        started = Product(a, b, acc if use_acc else torch.zeros_like(acc))
        if not self.eager:
            started.compute()
        self.current.products.append(started)
        self.pause(lambda: True)
        return started

    def finish(self, num_outstanding: int, deps: tuple[Product, ...]) -> Tensor:
        queue = self.current.products
        while len(queue) > num_outstanding:
            queue.pop(0).compute()
        (product,) = deps
        if product.result is None or product in queue:
            raise Fault("a product is used before it has been waited for")
        return product.result


_DTYPES = {gl.float32: torch.float32, gl.int32: torch.int32, gl.int64: torch.int64}


def _number(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x)


class _Tensor(torch.Tensor):
    """Takes Triton's dtypes in ``to``; whatever is computed from one is one."""

    def to(self, dtype: Any) -> Tensor:  # type: ignore[override]
        return super().to(_DTYPES.get(dtype, dtype))


def _tensor(x: Tensor) -> Tensor:
    return x.as_subclass(_Tensor)


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    offset, value, mask = torch.broadcast_tensors(_number(pointer.offset), _number(value), _number(mask))
    pointer.data[offset[mask].long()] = value[mask].to(pointer.data.dtype)


def _language(machine: Machine) -> types.SimpleNamespace:
    """gl and tl, as far as attention's forward kernel goes."""
    return types.SimpleNamespace(
        constexpr=tl.constexpr,
        float32=gl.float32,
        int32=gl.int32,
        int64=gl.int64,
        program_id=lambda axis: _tensor(torch.tensor(machine.program)),
        arange=lambda start, end, layout=None: _tensor(torch.arange(start, end)),
        full=lambda shape, value, dtype, layout=None: _tensor(torch.full(shape, value, dtype=_DTYPES[dtype])),
        zeros=lambda shape, dtype, layout=None: _tensor(torch.zeros(shape, dtype=_DTYPES[dtype])),
        where=lambda condition, a, b: torch.where(_number(condition), a, b),
        maximum=lambda a, b: torch.maximum(_number(a), _number(b)),
        minimum=lambda a, b: torch.minimum(_number(a), _number(b)),
        cdiv=lambda a, b: -(-a // b),
        max=lambda x, axis: x.amax(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2,
        log=torch.log,
        convert_layout=lambda x, layout: x,
        static_range=range,
        cast=lambda x, dtype: _number(x).to(_DTYPES[dtype]),
        store=_store,
        allocate_shared_memory=machine.allocate,
        warp_specialize=machine.specialize,
        NVMMADistributedLayout=lambda **_: None,
        DotOperandLayout=lambda **_: None,
        SliceLayout=lambda dim, parent: None,
    )


def _replacements(machine: Machine) -> dict[Any, Any]:
    """By identity of what the kernel's modules name."""
    language = _language(machine)
    load = getattr(hopper.tma, "async_load", None) or hopper.tma.async_copy_global_to_shared
    store = getattr(hopper.tma, "async_store", None) or hopper.tma.async_copy_shared_to_global
    found = {
        gl: language,
        tl: language,
        hopper.mbarrier: types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda barrier, count: setattr(barrier, "count", count),
            expect=machine.expect,
            wait=machine.wait,
            arrive=machine.arrive,
        ),
        hopper.tma: types.SimpleNamespace(store_wait=lambda pendings: None),
        hopper.fence_async_shared: machine.dirty.clear,
        hopper.warpgroup_mma: machine.product,
        hopper.warpgroup_mma_wait: machine.finish,
        load: machine.load,
        store: machine.store,
    }
    return {id(key): value for key, value in found.items()}


def _rebuilt(function: JITFunction, replaced: dict[int, Any], modules: dict[int, dict[str, Any]]) -> Callable[..., Any]:
    """The Python function under ``function`` in a copy of its module's names, what they mean here put in their place."""
    names = function.fn.__globals__
    if id(names) not in modules:
        mine = modules[id(names)] = dict(names)
        for name, value in names.items():
            if id(value) in replaced:
                mine[name] = replaced[id(value)]
            elif isinstance(value, JITFunction):
                mine[name] = _rebuilt(value, replaced, modules)
            elif isinstance(value, tl.constexpr):
                mine[name] = value.value
    return types.FunctionType(function.fn.__code__, modules[id(names)], function.fn.__name__)


def run(
    kernel: JITFunction,
    grid: int,
    arguments: dict[str, Any],
    seed: int,
    eager: bool,
    replacing: dict[Any, Any] | None = None,
) -> None:
    """Every program of ``grid``. ``replacing``: the kernel's functions to be replaced by others, to see what the model notices."""
    for program in range(grid):
        machine = Machine(program, seed + program, eager)
        replaced = _replacements(machine) | {id(key): value for key, value in (replacing or {}).items()}
        _rebuilt(kernel, replaced, {})(**arguments)
