"""Settings of the tests inside Triton's interpreter, started by ``tests/triton/test_interpreter.py`` in processes of their own.

The operations' own tests (``tests/ops``) are collected here a second time with ``triton`` as the implementation. In an ordinary
run, without TRITON_INTERPRET=1, this folder holds no test and changes nothing.
"""

import os
import sys
from pathlib import Path

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]
if INTERPRETING:
    tests = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(tests / folder) for folder in ("", "ops", "triton", "triton/interpreted")]
    ours = ("attention", "attention_sequences", "ffn", "linear", "loss", "norm", "rope")
    pytest.register_assert_rewrite(*(f"test_{module}" for module in ours), "tolerance")
    import interpreter_bf16

    interpreter_bf16.install()

#: tests/ops tests that say nothing here. A product of numpy's BLAS depends on a row's place in its tile, unlike a tensor core's.
_LEFT_OUT = (
    "test_results_do_not_depend_on_threads_or_batch",
    "test_a_row_has_the_bits_it_has_in_a_batch",
    "test_threads_share_rows_without_a_trace",
    "test_target_out_of_bounds",
)
#: Once is enough in the interpreter, whose time goes by the sequence: blocks are the same in every dtype.
_REPEATED = {"test_triton_attention_sequences.py": ("torch.float16", "alone[torch.bfloat16]")}


@pytest.fixture
def implementation() -> str:
    """The one implementation of this process, in place of the CPU's that ``tests/conftest.py`` lists."""
    return "triton"


@pytest.fixture
def compiled() -> str:
    return "triton"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what asks for an implementation, in a dtype that Triton takes."""
    if not INTERPRETING:
        return

    def kept(item: pytest.Item) -> bool:
        asks = {"implementation", "compiled"} & set(getattr(item, "fixturenames", ()))
        repeated = any(part in item.name for part in _REPEATED.get(item.path.name, ()))
        return bool(asks) and "float64" not in item.name and not item.name.startswith(_LEFT_OUT) and not repeated

    config.hook.pytest_deselected(items=[item for item in items if not kept(item)])
    items[:] = [item for item in items if kept(item)]
