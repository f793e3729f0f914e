"""The peer of the path benchmark: llama-cpp-python's own ``Llama``, called directly in one process, told what to do
over a pipe.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from llama_cpp import Llama

from bench.house import model_file


def main() -> None:
    threads, context = int(sys.argv[1]), int(sys.argv[2])
    llama: Any = Llama(
        str(model_file()),
        n_ctx=context,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=True,
        verbose=False,
    )
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        llama.reset()  # Llama reuses the longest common prefix: every prompt here is to be computed whole
        messages = [{"role": "user", "content": job["prompt"]}]
        times: list[float] = []
        asked = time.perf_counter()
        for chunk in llama.create_chat_completion(messages, stream=True, temperature=0, max_tokens=job["tokens"]):
            if chunk["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
        rate = (len(times) - 1) / (times[-1] - times[0])
        print(json.dumps({"first": times[0] - asked, "rate": rate}), flush=True)


if __name__ == "__main__":
    main()
