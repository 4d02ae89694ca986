"""Completions: each row's own, whatever the rows beside it, drawn by its own numbers, with nothing computed twice."""

import pytest
import torch
from torch import nn

from dft_lightning.data.batches.collating import PADDING_ROW
from dft_lightning.data.batches.sampling import BatchSampler
from dft_lightning.errors import InputError
from dft_lightning.models import generation
from dft_lightning.models.decoding import Draws, drawing_by, row_seeds
from dft_lightning.models.generation import GenerationOptions, generate
from dft_lightning.models.loading import load_causal_lm
from small_runs import TINY_GPT2
from test_row_checks import likeliest

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 97}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SLIDING = {**LLAMA, "model_type": "mistral", "sliding_window": 6}
PROMPTS = ([5, 6, 7], [11, 12, 13, 14, 15, 16, 17], [11, 12, 13, 14, 15, 16, 17], [20], [5, 6, 7], [5, 6, 7])


def padded(prompts, pad=0):
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = load_causal_lm(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.4)
    return model


class Watched(nn.Module):
    """A model that notes the shape of what it is given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes, self.config = model, [], model.config

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, **options):
        self.shapes.append(tuple(input_ids.shape))
        options |= {} if cache is None else {"cache": cache}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)


def completed(model, prompts, options, stops=()):
    ids, mask = padded(prompts)
    return generate(model, ids, mask, options, stop_token_ids=stops, pad_token_id=0)


def until(tokens, stops):
    ends = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens


@pytest.mark.parametrize("config", [TINY_GPT2, LLAMA, SLIDING], ids=["gpt2", "llama", "sliding"])
def test_rows_that_leave_the_batch_leave_the_others_as_they_are(config):
    """Every row against its own likeliest tokens without a cache; their ends lie apart."""
    model = model_of(config)
    alone = [likeliest(model, prompt, 12) for prompt in PROMPTS]
    stops = {alone[1][3], alone[3][6]}
    found = completed(model, PROMPTS, GenerationOptions(max_new_tokens=12), sorted(stops))
    expected = [until(tokens, stops) for tokens in alone]
    assert len({len(tokens) for tokens in expected}) > 1
    width = max(map(len, expected))
    assert found.tolist() == [tokens + [0] * (width - len(tokens)) for tokens in expected]


def test_a_prompt_of_several_rows_runs_once_and_rows_that_are_done_do_not_run():
    model = Watched(model_of(LLAMA))
    alone = likeliest(model.model, PROMPTS[1], 12)
    assert alone[3] not in alone[:3]
    prompts = [PROMPTS[1]] * 4 + [PROMPTS[3]] * 4
    generation._manner_of(model, 0, 16)
    model.shapes.clear()
    completed(model, prompts, GenerationOptions(max_new_tokens=8), [alone[3]])
    assert model.shapes == [(2, 7), (8, 1), (8, 1), (8, 1), (4, 1), (4, 1), (4, 1), (4, 1)]


def test_what_a_row_draws_depends_on_its_numbers_alone():
    model = model_of(LLAMA)
    options = GenerationOptions(6, True, 1.3, 0.95, 40)
    seeds = [(7, row, sample) for row, sample in ((0, 0), (1, 0), (1, 1), (2, 0), (0, 1), (0, 0))]
    with drawing_by(seeds):
        together = completed(model, PROMPTS, options).tolist()
    for place, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        torch.manual_seed(place)  # which counts nowhere
        with drawing_by([seed]):
            assert completed(model, [prompt], options).tolist() == [together[place]]
    assert together[0] == together[5]  # one prompt, one seed
    assert together[1] != together[2]
    with drawing_by([(8, *seed[1:]) for seed in seeds]):
        assert completed(model, PROMPTS, options).tolist() != together


def test_without_numbers_of_its_own_a_batch_draws_by_torchs_generator():
    model, options = model_of(LLAMA), GenerationOptions(6, True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(completed(model, [PROMPTS[0]] * 3, options).tolist())
    assert found[0] == found[1] != found[2]
    assert found[0][0] != found[0][1]


def test_tokens_are_drawn_by_the_cumulative_probability():
    """By hand: a row's number u takes the first token whose cumulative probability exceeds u."""
    probabilities = torch.tensor([[0.5, 0.0, 0.25, 0.25, 0.0]]).expand(4, -1)
    draws = Draws([(0, i) for i in range(4)], 2, lambda logits: logits, torch.device("cpu"))
    draws._numbers = torch.tensor([[0.0, 0.49], [0.5, 0.74], [0.75, 0.99], [1 - 2**-53, 0.1]], dtype=torch.float64)
    rows = torch.arange(4)
    assert draws(probabilities.log(), rows, 0)[0].tolist() == [0, 2, 3, 3]
    assert draws(probabilities.log(), rows, 1)[0].tolist() == [0, 2, 3, 0]
    assert draws(probabilities.log()[:2], rows[2:], 1)[0].tolist() == [3, 0]
    assert not draws.broken


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (2.0, 0.8, 0), (1.5, 1.0, 3)]
)
def test_draws_have_the_distribution_that_is_asked_for(temperature, top_p, top_k):
    """20,000 rows of one distribution against it, cut by hand."""
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0, -3.0], dtype=torch.float64)
    exact = (logits / temperature).softmax(-1)
    order = exact.argsort(descending=True)
    kept = order[: int((exact[order].cumsum(0) < top_p).sum()) + 1][: top_k or None]
    cut = torch.zeros_like(exact)
    cut[kept] = exact[kept] / exact[kept].sum()
    options = GenerationOptions(1, True, temperature, top_p, top_k)
    size = 20_000
    with drawing_by([(3, row) for row in range(size)]):
        draws = generation._draws(options, size, torch.device("cpu"))
    tokens, _ = draws(logits.float().expand(size, -1), torch.arange(size), 0)
    share = torch.bincount(tokens, minlength=6) / size
    assert (share[cut == 0] == 0).all()
    assert ((share - cut).abs() <= 5 * (cut * (1 - cut) / size).sqrt()).all()


def test_probabilities_that_are_nan_are_refused_where_tokens_are_drawn():
    model = model_of(LLAMA)
    generation._manner_of(model, 0, 16)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(InputError, match="the model's probabilities are NaN or infinite"):
        completed(model, PROMPTS, GenerationOptions(200, True))


def test_a_batch_that_is_completed_again_draws_anew():
    """As of a generate of one's own that takes the best of several, or that divides its batch."""
    model, options = model_of(LLAMA), GenerationOptions(6, True)

    def calls():
        with drawing_by([(3, row) for row in range(2)]):
            twice = [completed(model, PROMPTS[:2], options).tolist() for _ in range(2)]
            return [*twice, *(completed(model, [prompt], options).tolist() for prompt in PROMPTS[:2])]

    found = calls()
    assert found == calls()
    assert found[0] != found[1]
    assert [row for alone in found[2:] for row in alone] not in found[:2]
    with drawing_by([(3, 0), (3, 1)]):
        assert row_seeds(2) == [(3, 0), (3, 1)]
        assert row_seeds(2) == [(3, 0, 1), (3, 1, 1)]
        assert row_seeds(3) == [(3, 0, 2, row) for row in range(3)]


LONG = {**LLAMA, "max_position_embeddings": 64, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0}}
LONG["rope_parameters"] |= {"factor": 4.0, "original_max_position_embeddings": 16}


def test_frequencies_that_change_with_the_longest_row_leave_the_others_alone(caplog):
    """What is in a cache was turned by other frequencies, and a row beside a longer one would be, too."""
    caplog.set_level("INFO")
    model = model_of({**LONG, "max_position_embeddings": 16})
    prompts = [list(range(30, 43)), [5, 6, 7]]
    found = completed(model, prompts, GenerationOptions(max_new_tokens=12)).tolist()
    assert found == [likeliest(model, prompt, 12) for prompt in prompts]
    assert "dynamic frequencies change beyond 16 tokens" in caplog.text
    assert generation._manner_of(model, 0, 16) == generation.Manner()  # within them nothing changes


MAMBA = {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 97}
RWKV = {"model_type": "rwkv", "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 97}


@pytest.mark.parametrize(("config", "together"), [(MAMBA, True), (RWKV, False)], ids=["mamba", "rwkv"])
def test_recurrent_models_go_on_from_their_states(config, together):
    model = model_of(config)
    found = completed(model, PROMPTS, GenerationOptions(max_new_tokens=6)).tolist()
    assert found == [likeliest(model, prompt, 6) for prompt in PROMPTS]
    manner = generation._manner_of(model, 0, 16)
    assert (manner.use_cache, manner.together) == (True, together)


class Plain(nn.Module):
    """A model of one's own: no cache, no positions, no generate."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)

    def forward(self, input_ids, attention_mask, use_cache=False):
        kept = self.embedding(input_ids) * attention_mask.unsqueeze(-1)
        logits = self.head(kept.cumsum(1))
        return type("Output", (), {"logits": logits})()


def test_a_model_of_ones_own_without_a_cache_generates(caplog):
    torch.manual_seed(0)
    model = Plain()
    caplog.set_level("INFO")
    prompts = [[5, 6, 7], [8], [8]]
    found = completed(model, prompts, GenerationOptions(max_new_tokens=5))
    assert found.tolist() == [likeliest(model, prompt, 5) for prompt in prompts]
    assert "Plain does not go on from a cache, and computes all rows again for each token" in caplog.text


class Unsteady(Plain):
    """What it says of a token depends on how often it was asked."""

    calls = 0

    def generate(self):
        """As transformers' models have it."""

    def forward(self, input_ids, attention_mask, use_cache=False):
        self.calls += 1
        output = super().forward(input_ids, attention_mask)
        output.logits = output.logits * (1 + self.calls)
        return output


def test_a_model_that_cannot_generate_what_its_logits_say_is_refused():
    with pytest.raises(InputError, match="does not generate what its logits say, not even one row at a time"):
        completed(Unsteady(), PROMPTS[:2], GenerationOptions(max_new_tokens=2))


@pytest.mark.parametrize("size", [0, 1, 7, 12, 13])
def test_batches_are_the_same_on_any_number_of_ranks(size):
    lengths = torch.tensor([3, 9, 5, 9, 1, 2, 8, 4, 4, 6, 7, 7, 7][:size])
    rows = list(range(size))
    whole = list(BatchSampler(rows, 4, 1, 0, lengths))
    assert sorted(row for batch in whole for row in batch) == rows
    in_order = [int(lengths[row]) for batch in whole for row in batch]
    assert in_order == sorted(in_order, reverse=True)
    for ranks in (2, 3, 5):
        shares = [list(BatchSampler(rows, 4, ranks, rank, lengths)) for rank in range(ranks)]
        assert {len(share) for share in shares} == {len(BatchSampler(rows, 4, ranks, 0, lengths))}
        dealt = [batch for turn in zip(*shares, strict=True) for batch in turn]
        assert dealt[: len(whole)] == whole
        assert all(batch == [PADDING_ROW] for batch in dealt[len(whole) :])


def test_without_lengths_batches_are_of_rows_in_their_order():
    assert list(BatchSampler(list(range(5)), 2, 1, 0, None)) == [[0, 1], [2, 3], [4]]
