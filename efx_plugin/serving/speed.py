"""`python -m efx_plugin.serving.speed DIRECTORY`: a model in vLLM that generates when it is told to.

It writes the line "ready" when the model is loaded, and for each line that it reads, the number of requests, the
seconds that these took to generate `NEW_TOKENS` tokens each, greedily, behind random prompts of `PROMPT_TOKENS`. While
it waits, its threads sleep. It ends with its input; what vLLM prints goes to stderr.
"""

import os
import random
import sys
import time
from pathlib import Path

from efx_plugin.serving.launch import thread_binding

PROMPT_TOKENS = 16
NEW_TOKENS = 32
_MOST_REQUESTS = 32


def main() -> None:
    """Entry point of the module."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", thread_binding(1))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(Path(sys.argv[1]).absolute()),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=PROMPT_TOKENS + NEW_TOKENS + 1,
        max_num_seqs=_MOST_REQUESTS,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    answers.write("ready\n")
    for line in sys.stdin:
        drawn = random.Random(0)
        prompts = [
            {"prompt_token_ids": [drawn.randrange(vocabulary) for _ in range(PROMPT_TOKENS)]} for _ in range(int(line))
        ]
        started = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        answers.write(f"{time.perf_counter() - started}\n")


if __name__ == "__main__":
    main()
