"""Generation: against the definition (recompute everything each step), alone against in a batch, and the sampling rules."""

from __future__ import annotations

import pytest
import torch

from fastattn.models import Transformer, TransformerConfig
from fastattn.models.generate import sample
from fastattn.models.plain import PlainTransformer

CONFIGS = {
    "llama": TransformerConfig.tiny(vocab_size=101, max_seq_len=64, rope_interleaved=True),
    "gpt2": TransformerConfig.gpt2(vocab_size=101, dim=48, nlayers=2, nheads=3, ffn_dim=112, max_seq_len=64),
}
PROMPTS = [[5], [7, 99, 3, 4, 5, 6, 20, 21, 22, 23, 24, 25, 26], [1, 2, 3, 4], [100, 0, 100]]


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Transformer:
    torch.manual_seed(1)
    built = Transformer(CONFIGS[request.param])
    with torch.no_grad():
        for parameter in built.parameters():  # wide enough that the argmax moves about
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return built


def test_greedy_equals_recomputing_everything(model: Transformer) -> None:
    tokens, expected = torch.tensor([PROMPTS[1]]), []
    with torch.no_grad():
        for _ in range(25):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
            expected.append(int(tokens[0, -1]))
    assert model.generate([PROMPTS[1]], 25) == [expected]
    assert PlainTransformer(model.config, model.state_dict()).greedy(PROMPTS[1], 25) == expected
    assert len(set(expected)) > 5


def test_a_batch_of_unequal_prompts_gives_each_row_its_own_tokens(model: Transformer) -> None:
    together = model.generate(PROMPTS, 20)
    assert together == [model.generate([prompt], 20)[0] for prompt in PROMPTS]


def test_sampled_rows_do_not_depend_on_the_batch(model: Transformer) -> None:
    options = {"temperature": 0.9, "top_k": 30, "top_p": 0.95}
    together = model.generate(PROMPTS, 20, seed=11, **options)
    alone = [model.generate([prompt], 20, seed=11 + row, **options)[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together == model.generate(PROMPTS, 20, seed=11, **options)
    assert together != model.generate(PROMPTS, 20, seed=12, **options)


def test_stop_tokens_end_a_row_and_are_left_out(model: Transformer) -> None:
    free = model.generate(PROMPTS, 20)
    stop = free[1][4]
    stopped = model.generate(PROMPTS, 20, stop_tokens=[stop])
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]
    assert len(stopped[1]) <= 4


def test_callback_streams_every_token(model: Transformer) -> None:
    streamed: list[list[int]] = [[] for _ in PROMPTS]
    result = model.generate(PROMPTS, 9, on_token=lambda row, token: streamed[row].append(token))
    assert streamed == result


def test_training_mode_and_gradients_are_left_alone(model: Transformer) -> None:
    model.train()
    model.generate([[1, 2]], 2)
    assert model.training and torch.is_grad_enabled()
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
    assert model.embedding.weight.grad is not None


def test_tensor_prompts_and_empty_work(model: Transformer) -> None:
    assert model.generate(torch.tensor([[1, 2], [3, 4]]), 5) == model.generate([[1, 2], [3, 4]], 5)
    assert model.generate([[1, 2]], 0) == [[]]
    assert model.generate([], 4) == []
    assert len(model.generate([[1] * 60], 4)[0]) == 4  # exactly full


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, r"prompts\[0\] is empty"),
        ([[1], [101]], {}, r"prompts\[1\] has a token id outside \[0, 101\)"),
        ([[-1]], {}, "outside"),
        ([1, 2], {}, r"pass \[prompt\]"),
        (torch.ones(2, 2), {}, "integer tensor"),
        ([[1] * 62], {}, "exceed max_seq_len=64"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_requests(model: Transformer, prompts: object, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **{"max_new_tokens": 3} | options)  # type: ignore[arg-type]


def draws(logits: torch.Tensor, count: int = 4000, **options: float) -> torch.Tensor:
    """Shares of each token in ``count`` draws from one row of logits."""
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    chosen = sample(logits.expand(count, -1), generators=generators, **settings)  # type: ignore[arg-type]
    return torch.bincount(chosen, minlength=logits.shape[-1]) / count


LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.0049, 0.0009]),
        ({"top_k": 2}, [0.5, 0.25, 0, 0, 0]),
        ({"top_k": 99}, [0.5, 0.25, 0.15, 0.07, 0.03]),
        ({"top_p": 0.4}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.8}, [0.5, 0.25, 0.15, 0, 0]),
        ({"top_k": 3, "top_p": 0.7}, [0.5, 0.25, 0, 0, 0]),
    ],
)
def test_sampling_follows_the_distribution(options: dict[str, float], expected: list[float]) -> None:
    probabilities = torch.tensor(expected) / sum(expected)
    shares = draws(LOGITS, **options)
    assert (shares[probabilities == 0] == 0).all()
    # 4 standard deviations of a share over 4000 draws
    assert ((shares - probabilities).abs() <= 4 * (probabilities * (1 - probabilities) / 4000).sqrt() + 1e-9).all()
