"""The choice of a token by llama.cpp's samplers: each parameter as it is documented, and nothing between requests."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enclave.generation import InvalidRequest
from enclave.worker.sampler import Candidates, GrammarRefused, Logits, NoNumbers, Sampler
from tests.gguf_files import EOS, tiny_model
from tests.vocabularies import vocabulary
from tests.wire import OPTIONS
from vsockrpc.chat import CompletionRequest

SIZE = 262
"""Tokens of the tiny model's vocabulary: bytes, in GPT-2's order of them, and a few others."""
A, B, C, D = (ord(letter) for letter in "abcd")


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _say_nothing(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """What llama.cpp says of grammars."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("sampler") / "tiny.gguf"
    path.write_bytes(tiny_model().encode())
    llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(None))
    with vocabulary(path) as made:
        assert llama_cpp.llama_vocab_n_tokens(made) == SIZE
        yield made


CANDIDATES = Candidates(SIZE)


class Bench:
    """One request's sampler."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def choose(self, logits: Logits, *, is_constrained: bool = True) -> int:
        return self._sampler.sample(logits, CANDIDATES, is_constrained=is_constrained)

    def logprobs(self, logits: Logits, token: int) -> tuple[float, list[tuple[int, float]]] | None:
        return self._sampler.logprobs(logits, token)


class Samplers:
    def __init__(self, vocabulary: Any) -> None:
        self._vocabulary = vocabulary

    @contextmanager
    def of(self, prompt: Sequence[int] = (), grammar: str | None = None, **options: Any) -> Iterator[Bench]:
        request = CompletionRequest(prompt="", **options)
        with closing(Sampler(self._vocabulary, SIZE, request, prompt, grammar=grammar)) as sampler:
            yield Bench(sampler)


@pytest.fixture
def samplers(tiny: Any) -> Samplers:
    return Samplers(tiny)


def logits(**likely: float) -> Logits:
    """0 for every token but these letters."""
    made = np.zeros(SIZE, np.float32)
    for letter, logit in likely.items():
        made[ord(letter)] = logit
    return made


def noise(seed: int) -> Logits:
    return np.random.default_rng(seed).normal(0, 3, SIZE).astype(np.float32)


def softmax(values: Logits) -> np.ndarray[Any, np.dtype[np.float64]]:
    exponents = np.exp(values.astype(np.float64) - float(values.max()))
    return exponents / exponents.sum()  # type: ignore[no-any-return]


# --- The likeliest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.5, "min_p": 0.3, "typical_p": 0.5, "seed": 3}])
def test_without_temperature_the_likeliest_is_taken(samplers: Samplers, options: dict[str, Any]) -> None:
    with samplers.of(temperature=0, **options) as sampler:
        for seed in range(50):
            values = noise(seed)
            assert sampler.choose(values) == int(values.argmax())


def test_a_bias_goes_before_the_choice(samplers: Samplers) -> None:
    values = logits(a=5, b=4)
    with samplers.of(temperature=0, logit_bias=((B, 1.5),)) as sampler:
        assert sampler.choose(values) == B
    with samplers.of(temperature=0, logit_bias=((A, -100), (B, -0.5), (C, 3.25))) as sampler:
        assert sampler.choose(values) == B
    with samplers.of(temperature=0, logit_bias=((EOS, 100),)) as sampler:
        assert sampler.choose(values) == EOS
    assert values[B] == 4  # the model's logits stay as they are


@pytest.mark.parametrize("token", [SIZE, 2**31 - 1])
def test_a_bias_of_no_token_is_refused(samplers: Samplers, token: int) -> None:
    with (
        pytest.raises(InvalidRequest) as caught,
        samplers.of(logit_bias=((0, 1), (token, 1), (SIZE + 1, 1)), grammar='root ::= "x"'),
    ):
        pass
    assert (caught.value.expected, caught.value.got) == (f"< {SIZE}", str(token))


def test_the_last_token_may_have_a_bias(samplers: Samplers) -> None:
    with samplers.of(temperature=0, logit_bias=((SIZE - 1, 100),)) as sampler:
        assert sampler.choose(logits(a=5)) == SIZE - 1


# --- Penalties -------------------------------------------------------------------------------------------------------


def test_a_presence_penalty_counts_once_and_in_the_answer_alone(samplers: Samplers) -> None:
    values = logits(a=5, b=4, c=3.5)
    with samplers.of([A, B], temperature=0, presence_penalty=1.25) as sampler:
        # a 5 -> 3.75, b 4 -> 2.75, and a is not penalised twice: 3.75 > 3.5
        assert [sampler.choose(values) for _ in range(5)] == [A, B, A, A, A]


def test_a_frequency_penalty_counts_each_time(samplers: Samplers) -> None:
    values = logits(a=5, b=4, c=3.5)
    with samplers.of([A] * 10, temperature=0, frequency_penalty=0.75) as sampler:
        # a: 5, 4.25, 3.5, 2.75; b: 4, 3.25; c: 3.5
        assert [sampler.choose(values) for _ in range(2)] == [A, A]
        assert sampler.choose(values) == B
        assert {sampler.choose(values) for _ in range(2)} == {A, C}


def test_a_negative_penalty_makes_likelier(samplers: Samplers) -> None:
    with samplers.of(temperature=0, presence_penalty=-2) as sampler:
        assert sampler.choose(logits(a=5, b=4)) == A
        assert sampler.choose(logits(a=4, b=5)) == A


def test_a_repetition_penalty_counts_from_the_prompt_on(samplers: Samplers) -> None:
    values = logits(a=4, b=3, c=2.5)
    with samplers.of([A], temperature=0, repetition_penalty=2) as sampler:
        assert sampler.choose(values) == B  # a: 4 / 2
        assert sampler.choose(values) == C  # b: 3 / 2
        assert sampler.choose(values) == A  # c: 2.5 / 2


def test_a_repetition_penalty_makes_what_is_unlikely_unlikelier(samplers: Samplers) -> None:
    values = np.full(SIZE, -10, np.float32)
    values[[A, B]] = -1, -1.5
    with samplers.of([A], temperature=0, repetition_penalty=2) as sampler:
        assert sampler.choose(values) == B  # a: -1 * 2
    with samplers.of([A], temperature=0, repetition_penalty=0.5) as sampler:
        assert [sampler.choose(values) for _ in range(3)] == [A, A, A]


def test_a_long_prompt_is_looked_back_on_as_a_whole(samplers: Samplers) -> None:
    with samplers.of([A] + [B] * 20_000, temperature=0, repetition_penalty=4) as sampler:
        assert sampler.choose(logits(a=4, c=1.5)) == C


# --- The dice --------------------------------------------------------------------------------------------------------


def drawn(bench: Bench, values: Logits, count: int) -> list[int]:
    return [bench.choose(values) for _ in range(count)]


def test_a_seed_says_what_is_drawn(samplers: Samplers) -> None:
    values = noise(1)
    with samplers.of(seed=7) as one, samplers.of(seed=7) as same, samplers.of(seed=8) as other:
        first = drawn(one, values, 60)
        assert drawn(same, values, 60) == first
        assert drawn(other, values, 60) != first


@pytest.mark.parametrize("seed", [0, 2**32 - 2])
def test_every_seed_is_one(samplers: Samplers, seed: int) -> None:
    values = noise(2)
    with samplers.of(seed=seed) as one, samplers.of(seed=seed) as same:
        assert drawn(one, values, 40) == drawn(same, values, 40)


def test_without_a_seed_no_two_are_alike(samplers: Samplers) -> None:
    values = np.zeros(SIZE, np.float32)
    with samplers.of() as one, samplers.of() as other:
        assert drawn(one, values, 60) != drawn(other, values, 60)


def test_two_requests_do_not_disturb_each_other(samplers: Samplers) -> None:
    """Neither what a neighbour draws, nor its penalties, nor its grammar, shows in what a request gets."""
    values = noise(3)
    options: dict[str, Any] = {"seed": 7, "frequency_penalty": 0.5, "repetition_penalty": 1.1, "top_k": 30}
    with samplers.of([A, B], **options) as alone:
        expected = drawn(alone, values, 40)
    digits = "root ::= [0-9]+"
    with samplers.of([A, B], **options) as one, samplers.of([C], grammar=digits, seed=9, temperature=2) as other:
        mixed = []
        for step in range(40):
            other.choose(noise(step))
            mixed.append(one.choose(values))
            other.choose(values)
    assert mixed == expected


def test_the_most_likely_alone_are_drawn(samplers: Samplers) -> None:
    values = logits(a=5, b=4.5, c=4, d=3.5)
    p = softmax(values)
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({"top_k": 1}, {A}),
        ({"top_k": 2}, {A, B}),
        ({"top_p": float(p[A]) - 0.01}, {A}),
        ({"top_p": float(p[A] + p[B]) - 0.01}, {A, B}),
        ({"min_p": 0.99}, {A}),
        ({"min_p": float(math.exp(-1)) - 0.01}, {A, B, C}),
        ({"temperature": 0.01}, {A}),
    ]
    for options, expected in cases:
        with samplers.of(seed=5, **options) as sampler:
            assert set(drawn(sampler, values, 200)) == expected, options


def test_what_is_typical_need_not_be_the_likeliest(samplers: Samplers) -> None:
    """Its surprise is the nearest to the one to be expected."""
    values = np.full(SIZE, -20, np.float32)
    values[A], values[[B, C, D]] = 1.0, 0.5
    p = softmax(values)
    entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
    assert abs(-math.log(p[B]) - entropy) < abs(-math.log(p[A]) - entropy)
    with samplers.of(typical_p=1e-6, seed=1) as sampler:
        assert set(drawn(sampler, values, 20)) <= {B, C, D}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.1, 80), share=st.floats(0.05, 0.95))
def test_typical_tokens_are_those_whose_surprise_is_nearest_to_the_expected(
    samplers: Samplers, seed: int, spread: float, share: float
) -> None:
    """Also where most tokens have next to no probability: a logarithm of none spoils nothing."""
    values = np.random.default_rng(seed).normal(0, spread, SIZE).astype(np.float32)
    p = softmax(values)
    surprise = -np.log(np.maximum(p, 1e-300))
    order = np.argsort(np.abs(surprise - float((p * surprise).sum())), kind="stable")
    until = int(np.searchsorted(p[order].cumsum(), share))
    typical = set(order[: until + 2].tolist())  # one more: the sums are rounded
    with samplers.of(typical_p=share, seed=1) as sampler:
        assert set(drawn(sampler, values, 20)) <= typical


def test_what_is_typical_is_looked_for_among_the_likeliest(tiny: Any) -> None:
    """What more than a thousand tokens have together does not count where it is next to nothing."""
    size = 5000
    values = np.full(size, -30, np.float32)
    values[:900] = np.random.default_rng(1).normal(0, 2, 900)
    p = softmax(values)
    surprise = -np.log(p)
    order = np.argsort(np.abs(surprise - float((p * surprise).sum())), kind="stable")
    until = int(np.searchsorted(p[order].cumsum(), 0.6))
    request = CompletionRequest(prompt="", typical_p=0.6, seed=1)
    candidates = Candidates(size)
    with closing(Sampler(tiny, size, request, ())) as sampler:
        said = {sampler.sample(values, candidates, is_constrained=False) for _ in range(3000)}
    assert said <= set(order[: until + 2].tolist())
    assert len(said) > until * 0.8


def test_a_temperature_is_what_the_logits_are_divided_by(samplers: Samplers) -> None:
    values = logits(a=6, b=5.3)
    expected = softmax(values / np.float32(0.7))[A]
    with samplers.of(temperature=0.7, seed=11, top_k=2) as sampler:
        share = drawn(sampler, values, 4000).count(A) / 4000
    pair = expected / (expected + softmax(values / np.float32(0.7))[B])
    assert share == pytest.approx(pair, abs=0.03)


# --- Grammars --------------------------------------------------------------------------------------------------------

WORD = 'root ::= "b" [cd]+ "a"'


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_a_grammar_has_the_last_word(samplers: Samplers, temperature: float) -> None:
    with samplers.of(grammar=WORD, temperature=temperature, seed=3) as sampler:
        said = [sampler.choose(noise(seed)) for seed in range(3)]
        assert said[0] == B
        assert {*said[1:]} <= {A, C, D}
        while said[-1] != A:
            said.append(sampler.choose(logits(a=1)))
        assert sampler.choose(logits(a=9)) == EOS  # the end alone is left


def test_what_a_grammar_allows_is_chosen_as_without_it(samplers: Samplers) -> None:
    values = np.full(SIZE, -50, np.float32)
    values[A : A + 26] = noise(4)[:26]
    with samplers.of(seed=7) as free, samplers.of(seed=7, grammar="root ::= [a-z]*") as bound:
        assert drawn(free, values, 60) == drawn(bound, values, 60)


def test_where_nothing_is_constrained_the_grammar_neither_rules_nor_moves(samplers: Samplers) -> None:
    with samplers.of(temperature=0, grammar=WORD) as sampler:
        assert sampler.choose(logits(c=9), is_constrained=False) == C
        assert sampler.choose(logits(d=9), is_constrained=False) == D
        assert sampler.choose(logits(c=9)) == B  # from its beginning
        assert sampler.choose(logits(d=9)) == D


def test_a_grammar_goes_together_with_everything_else(samplers: Samplers) -> None:
    with samplers.of(
        [C], temperature=0, grammar=WORD, logit_bias=((D, -5),), repetition_penalty=1.5, presence_penalty=0.5
    ) as sampler:
        values = logits(a=1, b=2, c=3, d=4)
        assert sampler.choose(values) == B
        assert sampler.choose(values) == C  # d is at -1, c at 2
        assert [sampler.choose(values) for _ in range(2)] == [C, C]  # at 1.5 from now on
        assert sampler.choose(logits(a=4, c=3)) == A


def test_a_token_that_stands_for_no_text_never_comes_under_a_grammar(tiny: Any) -> None:
    """llama.cpp's grammar takes a control token for its name."""
    request = CompletionRequest(prompt="", temperature=0)
    grammar, unspoken = "root ::= [a-d]+", np.array([A, B], np.int32)
    with closing(Sampler(tiny, SIZE, request, (), grammar=grammar, unspoken=unspoken)) as sampler:
        favoured = logits(a=9, b=8, c=7)
        assert sampler.sample(favoured, CANDIDATES, is_constrained=True) == C
        assert sampler.sample(favoured, CANDIDATES, is_constrained=False) == A


def test_top_k_leaves_what_the_grammar_allows(samplers: Samplers) -> None:
    """The grammar goes first: else one token of many might be left, and that one forbidden."""
    with samplers.of(grammar=WORD, top_k=1, top_p=0.01, min_p=0.9, seed=1) as sampler:
        assert sampler.choose(logits(a=50, b=-50)) == B


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "root",
        'root ::= "a',
        "root ::= other",
        'start ::= "a"',
        "root ::= [a",
        'root ::= root "a"',
        'root ::= "a\0"',
    ],
)
def test_a_broken_grammar_is_refused(samplers: Samplers, grammar: str) -> None:
    with pytest.raises(GrammarRefused) as caught, samplers.of(grammar=grammar):
        pass
    assert caught.value.code == "invalid_request"


# --- Numbers that are none -------------------------------------------------------------------------------------------

SINGLES = st.floats(width=32) | st.sampled_from([-math.inf, math.inf, math.nan, 3.4e38, -3.4e38, 1e30, 1.1e30, 0.0])
HOSTILE = {name: strategy for name, strategy in OPTIONS.items() if name not in ("model", "logit_bias", "cache_secret")}
EXTREMES: dict[str, list[float]] = {
    "temperature": [0, 0.001, 2],
    "repetition_penalty": [0.01, 4],
    "typical_p": [5e-324, 1e-46, 0.5, 1 - 2**-53],
    "top_p": [5e-324, 1e-46, 0.5, 1 - 2**-53],
    "min_p": [5e-324, 1e-46, 0.5, 1],
    "top_k": [0, 1, 1000],
    "presence_penalty": [-2, 1e-46, 2],
    "frequency_penalty": [-2, 1e-46, 2],
}
BIASES = st.dictionaries(st.sampled_from([A, B, C, D, EOS]) | st.integers(0, SIZE - 1), st.floats(-100, 100))


def test_every_option_s_bounds_are_among_the_extremes() -> None:
    for name, values in EXTREMES.items():
        for value in values:
            CompletionRequest.decode({"prompt": "", name: value})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data(), biases=BIASES, base=SINGLES, seed=st.none() | st.integers(0, 2**32 - 2))
def test_whatever_is_asked_of_whatever_logits_a_token_comes_that_may(
    samplers: Samplers, data: st.DataObject, biases: dict[int, float], base: float, seed: int | None
) -> None:
    """llama.cpp ends the process for one that its grammar forbids."""
    options = {
        name: data.draw(st.sampled_from(values) | HOSTILE[name], label=name)
        for name, values in EXTREMES.items()
        if data.draw(st.booleans())
    }
    values = np.full(SIZE, base, np.float32)
    for token, value in data.draw(st.dictionaries(st.integers(0, SIZE - 1), SINGLES, max_size=6)).items():
        values[token] = value
    kept = values.copy()
    request = CompletionRequest.decode({"prompt": "", "logit_bias": list(biases.items()), "seed": seed, **options})
    chosen = {name: getattr(request, name) for name in (*options, "logit_bias", "seed")}
    for grammar, allowed in (("root ::= [bc] [bc] [bc]", {B, C}), (None, set(range(SIZE)))):
        with samplers.of([A, B], grammar=grammar, **chosen) as sampler:
            for _ in range(3):
                try:
                    token = sampler.choose(values)
                except InvalidRequest as error:
                    assert isinstance(error, GrammarRefused | NoNumbers)  # noqa: PT017 - a token may come, too
                    break
                assert token in allowed
                assert grammar is None or values[token] > -np.inf
    assert np.array_equal(values, kept, equal_nan=True)


@pytest.mark.parametrize("option", [{}, {"temperature": 0}, {"typical_p": 0.5}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("number", [math.nan, math.inf, 3e38])
def test_logits_that_are_no_numbers_are_a_refusal(samplers: Samplers, option: dict[str, Any], number: float) -> None:
    for grammar in (None, "root ::= [bc]+"):
        with samplers.of(grammar=grammar, **option) as sampler, pytest.raises(NoNumbers) as caught:
            sampler.choose(logits(b=number))
        assert caught.value.code == "invalid_request"


def test_a_grammar_s_token_that_the_model_rules_out_does_not_come(samplers: Samplers) -> None:
    values = np.zeros(SIZE, np.float32)
    values[[B, C]] = -np.inf
    for temperature in (0, 1):
        with (
            samplers.of(grammar="root ::= [bc]+", temperature=temperature) as sampler,
            pytest.raises(GrammarRefused, match="no token with which"),
        ):
            sampler.choose(values)


# --- Log probabilities -----------------------------------------------------------------------------------------------

FINITE = st.lists(st.floats(-40, 40, width=32), min_size=SIZE, max_size=SIZE)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=FINITE, token=st.integers(0, SIZE - 1))
def test_log_probabilities_are_those_of_the_softmax(samplers: Samplers, values: list[float], token: int) -> None:
    made = np.array(values, np.float32)
    with samplers.of(top_logprobs=20) as sampler:
        found = sampler.logprobs(made, token)
    assert found is not None
    own, top = found
    expected = np.log(softmax(made))
    assert own == pytest.approx(expected[token], abs=1e-6)
    assert own <= 0
    assert len({each for each, _ in top}) == 20
    assert [its for _, its in top] == pytest.approx([expected[each] for each, _ in top], abs=1e-6)
    assert [its for _, its in top] == pytest.approx(sorted(expected, reverse=True)[:20], abs=1e-6)


def test_all_log_probabilities_together_are_one(samplers: Samplers) -> None:
    values = noise(6)
    with samplers.of(top_logprobs=0) as sampler:
        each = [found[0] for token in range(SIZE) if (found := sampler.logprobs(values, token)) is not None]
    assert sum(map(math.exp, each)) == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 1, 2, 20])
def test_as_many_of_the_likeliest_as_were_asked_for(samplers: Samplers, count: int) -> None:
    values = noise(7)
    with samplers.of(top_logprobs=count) as sampler:
        found = sampler.logprobs(values, A)
    assert found is not None
    assert [token for token, _ in found[1]] == list(np.argsort(-values, kind="stable")[:count])


def test_log_probabilities_are_the_model_s_own(samplers: Samplers) -> None:
    """Whatever the request does to the choice."""
    values = noise(8)
    with samplers.of(top_logprobs=3) as plain:
        expected = plain.logprobs(values, B)
    options: dict[str, Any] = {"temperature": 0.3, "logit_bias": ((B, 100),), "presence_penalty": 2, "top_k": 1}
    with samplers.of([B], grammar="root ::= [0-9]*", top_logprobs=3, **options) as bent:
        bent.choose(values)
        assert bent.logprobs(values, B) == expected


def test_nobody_asked(samplers: Samplers) -> None:
    with samplers.of() as sampler:
        assert sampler.logprobs(noise(9), A) is None


def test_what_cannot_come_has_no_probability(samplers: Samplers) -> None:
    values = logits(a=1)
    values[B] = -np.inf
    with samplers.of(top_logprobs=1) as sampler:
        found = sampler.logprobs(values, B)
    assert found is not None
    assert found[0] == -math.inf


def test_a_logit_far_above_all_others_does_not_overflow(samplers: Samplers) -> None:
    with samplers.of(top_logprobs=2) as sampler:
        found = sampler.logprobs(logits(a=3e38), A)
    assert found is not None
    assert found[0] == 0
