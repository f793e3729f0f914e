"""The engine process: ``python -I -m enclave.worker PIPE WEIGHTS``, started by :class:`enclave.engine.LlamaEngine`
with two inherited descriptors.

It holds no key, has no NSM, and gives up whatever it can before the first byte of a prompt comes: see :func:`main`
for the order. Everything that can still be imported later fails, so all of it is imported here. Its standard streams
lead nowhere.
"""

from __future__ import annotations

if __name__ == "__main__":  # before anything can be imported that nobody measured
    from enclave.imports import only_measured

    only_measured()

import os
import socket
import sys
from contextlib import suppress

from attestation.errors import StrongroomError
from attestation.model_family import model_family
from enclave import confine
from enclave.generation import InvalidRequest
from enclave.pipe import (
    Load,
    Ready,
    Refused,
)
from enclave.worker.llama import Llama
from enclave.worker.loop import Gone, Loop, Pipe
from enclave.worker.prompt import ChatTemplate
from vsockrpc.chat import ChatMessage, ChatRequest

NICENESS = 5
"""Decoding keeps every core busy: whoever carries what it has decoded goes first. Without, each of the three wake-ups
to the client waits for a slice of a decoding thread, 2 ms each (``bench.path``).
"""


def main(arguments: list[str]) -> int:
    """Exit status: 0 when the server went, 1 when it refused the model or broke down."""
    pipe_fd, weights_fd = map(int, arguments)
    pipe = Pipe(socket.socket(fileno=pipe_fd))
    try:
        load = pipe.receive(wait=True)
        if not isinstance(load, Load):
            return 1
        # 1. Rights go first; the weights are opened once more through /proc, which a process that changed its user
        # may do only while dumpable.
        os.nice(NICENESS)
        confine.close_all_but({pipe_fd, weights_fd})
        confine.forbid_core_dumps()
        own_user = confine.become(load.settings.uid)
        confine.drop_capabilities()
        confine.die_with(load.parent)
        confine.forbid_new_privileges()
        confine.set_dumpable(True)
        llama = Llama(f"/proc/self/fd/{weights_fd}", load.settings, threads=load.settings.threads, pins=True)
        confine.set_dumpable(False)
        os.close(weights_fd)
        tokenizer = llama.tokenizer(load.template)
        template = ChatTemplate(load.template, bos=llama.bos, eos=llama.eos, mark_starts=tokenizer.mark_starts)
        family = model_family(
            llama.metadata("general.architecture"), llama.metadata("tokenizer.ggml.pre"), load.template
        )
        loop = Loop(pipe, llama, template, tokenizer, family, load.settings, ends=tokenizer.turn_ends(template))
        # 2. Whatever is made on first use is used once. A template may refuse a conversation; it may not fail on the
        # simplest.
        llama.warm_up()
        with suppress(InvalidRequest):
            template.render(ChatRequest((ChatMessage("user", ""),)))
        # 3. Nothing new from here on, then the filter.
        confine.forbid_new_resources()
        seccomp = confine.allow_decoding_only()
        pipe.send(Ready(own_user, seccomp, family))
        loop.run()
    except Gone:
        return 0
    except StrongroomError as error:
        pipe.send(Refused(error.code, error.message, error.expected, error.got))
        return 1
    raise AssertionError("the loop ends by an exception")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
