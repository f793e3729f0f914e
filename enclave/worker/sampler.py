"""The next token, from the model's logits and one request's parameters. Only the engine process imports this.

llama.cpp's own samplers make the choice, each request's chain with a generator of its own, so that no neighbour uses up
another's random numbers. What would cost Python or llama.cpp a pass over the whole vocabulary that nobody needs is
spared: the likeliest token of all is one call of numpy.

They compute in 32-bit floats, and where these overflow or are none they fall back on some token, be it one that the
grammar forbids, by which llama.cpp ends the process. So logits are bounded before a chain sees them, and no token gets
to the grammar that it was not asked about.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from typing import Any, Final

import llama_cpp
import numpy as np
import numpy.typing as npt

from enclave.generation import InvalidRequest
from vsockrpc.chat import Generation

Logits = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

_CANDIDATE: Final = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""``llama_token_data``."""
_ANSWER_WINDOW: Final = 1 << 13
"""Tokens of an answer that penalties look back on."""
_MAX_LOGIT: Final = 1e30
"""The likeliest token's at most, either way. The least temperature and the penalties bring it to 1e35 at most, and 32
bits hold 3e38.
"""
_TYPICAL_OF: Final = 1000
"""So many of the likeliest tokens locally typical sampling chooses from: it sorts all that it gets."""
_LEAST_SHARE: Final = 1e-30
"""Of the likeliest token's probability. llama.cpp's locally typical sampling multiplies 0 by the logarithm of 0 where
one has none.
"""


class GrammarRefused(InvalidRequest):
    """llama.cpp does not take a grammar that was made for a request."""


class NoNumbers(InvalidRequest):
    """What the model computed is nothing that a token can be chosen by."""

    def __init__(self) -> None:
        super().__init__("the model's logits are no numbers that a token can be chosen by")


class Sampler:
    """One request's way from logits to tokens. Its parameters are within the bounds of ``Generation``'s decoding."""

    def __init__(
        self,
        vocabulary: Any,
        size: int,
        request: Generation,
        prompt: Sequence[int],
        *,
        grammar: str | None = None,
        unspoken: Tokens | None = None,
    ) -> None:
        """``size`` is the vocabulary's, in tokens. ``grammar`` is GBNF with the rule ``root``. ``unspoken`` are tokens
        that stand for no text, and those that end an answer without llama.cpp's knowledge: its grammar takes them for
        their names, so none may come where it has its say.

        Raises InvalidRequest for a bias of a token that there is not, and GrammarRefused.
        """
        unknown = [token for token, _ in request.logit_bias if token >= size]
        if unknown:
            raise InvalidRequest("logit_bias names a token that there is not", expected=f"< {size}", got=unknown[0])
        self._top_logprobs = request.top_logprobs
        self._vocabulary = vocabulary
        self._unspoken = np.empty(0, np.int32) if unspoken is None else unspoken
        self._biased = np.array([token for token, _ in request.logit_bias], np.intp)
        self._biases = np.array([bias for _, bias in request.logit_bias], np.float32)
        self._grammar = None if grammar is None else self._make_grammar(grammar)
        self._chain: Any = None
        if not _takes_the_likeliest(request):
            self._chain = not_null(llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params()))
            self._fill(request, size, prompt)

    def _make_grammar(self, grammar: str) -> Any:
        text = grammar.encode()
        whole = bool(text) and b"\0" not in text  # llama.cpp takes an empty one for none, and reads as far as a zero
        made = whole and llama_cpp.llama_sampler_init_grammar(self._vocabulary, text, b"root")
        if not made:
            raise GrammarRefused("the grammar of the requested format is not accepted")
        return made

    def _fill(self, request: Generation, size: int, prompt: Sequence[int]) -> None:
        """In llama.cpp's own order. Repetition counts from the prompt on, frequency and presence in the answer alone,
        as OpenAI's API has it.
        """
        if request.repetition_penalty != 1:
            repeated = llama_cpp.llama_sampler_init_penalties(
                size, len(prompt) + _ANSWER_WINDOW, request.repetition_penalty, 0, 0
            )
            self._add(repeated)
            for token in prompt:
                llama_cpp.llama_sampler_accept(repeated, token)
        if request.frequency_penalty or request.presence_penalty:
            self._add(
                llama_cpp.llama_sampler_init_penalties(
                    size, _ANSWER_WINDOW, 1, request.frequency_penalty, request.presence_penalty
                )
            )
        if request.temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        if request.top_k > 0:
            self._add(llama_cpp.llama_sampler_init_top_k(request.top_k))
        if request.typical_p < 1:
            if request.top_k == 0:
                self._add(llama_cpp.llama_sampler_init_top_k(_TYPICAL_OF))
            self._add(llama_cpp.llama_sampler_init_min_p(_LEAST_SHARE, 1))
            self._add(llama_cpp.llama_sampler_init_typical(request.typical_p, 1))
        if request.top_p < 1:
            self._add(llama_cpp.llama_sampler_init_top_p(request.top_p, 1))
        if request.min_p > 0:
            self._add(llama_cpp.llama_sampler_init_min_p(request.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(request.temperature))
        seed = secrets.randbits(32) if request.seed is None else request.seed
        self._add(llama_cpp.llama_sampler_init_dist(seed))

    def _add(self, link: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, not_null(link))

    def sample(self, logits: Logits, candidates: Candidates, *, is_constrained: bool) -> int:
        """The next token. The grammar has its say where ``is_constrained``, and only the tokens of such places count
        for it.

        The choice is made without the grammar first, and again with it only if it was none that the grammar allows: a
        pass of the grammar over a whole vocabulary costs as much as the decoding. Raises GrammarRefused where no token
        can come, and NoNumbers.
        """
        if len(self._biased):
            logits = logits.copy()
            logits[self._biased] += self._biases
        token = self._choose(logits, candidates, grammar=None)
        if self._grammar is not None and is_constrained:
            if not self._allows(candidates, token):
                token = self._choose(logits, candidates, grammar=self._grammar)
                if not self._allows(candidates, token):
                    raise GrammarRefused("the token that was chosen is none with which the requested format goes on")
            llama_cpp.llama_sampler_accept(self._grammar, token)
        if self._chain is not None:
            llama_cpp.llama_sampler_accept(self._chain, token)
        return token

    def _allows(self, candidates: Candidates, token: int) -> bool:
        return token not in self._unspoken and candidates.allows(self._grammar, token)

    def _choose(self, logits: Logits, candidates: Candidates, *, grammar: Any) -> int:
        if self._chain is None and grammar is None:
            token = int(logits.argmax())
            _require_number(logits[token])
            return token
        candidates.fill(logits)
        if grammar is not None:
            candidates.exclude(self._unspoken)
            candidates.apply(grammar)
            if not candidates.drop_excluded():
                raise GrammarRefused("the model's vocabulary has no token with which the requested format could go on")
        _require_number(candidates.highest)
        return candidates.likeliest() if self._chain is None else candidates.choose(self._chain)

    def logprobs(self, logits: Logits, token: int) -> tuple[float, list[tuple[int, float]]] | None:
        """The natural logarithm of a token's probability in the model's own distribution, and the likeliest tokens with
        theirs: where the request asked for it.
        """
        if self._top_logprobs is None:
            return None
        highest = logits.max()
        total = float(highest) + float(np.log(np.exp(logits - highest, dtype=np.float64).sum()))
        count = min(self._top_logprobs, len(logits))
        top = np.argpartition(logits, -count)[-count:] if count else np.empty(0, np.intp)
        ordered = top[np.argsort(-logits[top], kind="stable")]
        return float(logits[token]) - total, [(int(each), float(logits[each]) - total) for each in ordered]

    def close(self) -> None:
        for made in (self._chain, self._grammar):
            if made is not None:
                llama_cpp.llama_sampler_free(made)


def _require_number(logit: float) -> None:
    """Of the likeliest token: one that is not among numbers shows there, too. Raises NoNumbers."""
    if not -_MAX_LOGIT <= logit <= _MAX_LOGIT:
        raise NoNumbers


def _takes_the_likeliest(request: Generation) -> bool:
    """Of all tokens, by their logits and biases alone."""
    return (
        request.temperature == 0
        and request.repetition_penalty == 1
        and request.frequency_penalty == request.presence_penalty == 0
    )


class Candidates:
    """Room for one ``llama_token_data`` of each token, filled anew for each choice. Whoever samples shares it."""

    def __init__(self, size: int) -> None:
        self._data = np.zeros(size, _CANDIDATE)
        self._ids = np.arange(size, dtype=np.int32)
        self._array = llama_cpp.llama_token_data_array()
        self._one = np.zeros(1, _CANDIDATE)
        self._single = llama_cpp.llama_token_data_array()
        assert _CANDIDATE.itemsize == ctypes.sizeof(llama_cpp.llama_token_data)

    def fill(self, logits: Logits) -> None:
        self._data["id"] = self._ids
        self._data["logit"] = logits
        self._point(self._array, self._data)

    def exclude(self, tokens: Tokens) -> None:
        self._data["logit"][tokens] = -np.inf

    def apply(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self._array))

    def drop_excluded(self) -> int:
        """Leaves those that are not ruled out, whose number is returned: no rounding can choose another then."""
        kept = self._data[self._data["logit"] != -np.inf]
        self._data[: len(kept)] = kept
        self._array.size = len(kept)
        return len(kept)

    def choose(self, chain: Any) -> int:
        """What a chain selects. Raises NoNumbers where it selects none."""
        self.apply(chain)
        selected = self._array.selected
        if not 0 <= selected < self._array.size:
            raise NoNumbers
        return int(self._array.data[selected].id)

    @property
    def highest(self) -> float:
        """NaN if any is."""
        return float(self._left["logit"].max())

    def likeliest(self) -> int:
        return int(self._left["id"][self._left["logit"].argmax()])

    @property
    def _left(self) -> npt.NDArray[Any]:
        return self._data[: self._array.size]

    def allows(self, grammar: Any, token: int) -> bool:
        self._one[0] = (token, 1.0, 0.0)
        self._point(self._single, self._one)
        llama_cpp.llama_sampler_apply(grammar, ctypes.byref(self._single))
        return bool(self._one["logit"][0] != -np.inf)

    @staticmethod
    def _point(array: Any, data: npt.NDArray[Any]) -> None:
        array.data = ctypes.cast(data.ctypes.data, llama_cpp.llama_token_data_p)
        array.size, array.selected, array.sorted = len(data), -1, False


def not_null(pointer: Any) -> Any:
    """An object that llama.cpp made. Raises MemoryError where it made none."""
    if not pointer:
        raise MemoryError("llama.cpp returned no object")
    return pointer
