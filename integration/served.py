"""Whether two servings of a model agree: log-probabilities within a bound, and greedy tokens up to ties.

The bound follows from the arithmetic, not from a processor. Two servings may round every intermediate result
differently: kernels add up in another order, and a conversion to bfloat16 may round or cut off (vLLM's build for
AVX-512 without bfloat16 cuts off the results of its dense int8 layers). So:

- A rounding changes a number by at most one unit in its last place: by a relative error within u = 2^-7 in bfloat16.
  Errors spread evenly within u have the root mean square u / sqrt(3).
- Each of a model's L decoder layers adds two parts to the residual stream. At most 16 results are rounded on their way
  (norms, projections, rotary embedding, probabilities, attention, activation, product, and two more with an adapter),
  and 2 sums of the stream itself. Parts are about equally large and independent: those of layer l have 1 / l of the
  square of the stream behind it. So the squares of all relative errors add up to n u^2 / 3, with
  n = 16 (1 + 1/2 + ... + 1/L) + 2 L.
- In float32, u = 2^-23, and sums are rounded at every summand: a result counts as often as its longest sum has terms.
- Where activations are quantized to int8 (W8A8), a unit is the largest magnitude of a row / 127, which is about four
  times the row's root mean square / 127; this happens to the inputs of a layer's 4 products.
- Both servings err independently of each other, which doubles the squares.
- A relative error of the last hidden state moves a logit by that part of the spread of logits (rows of the output layer
  are about equally long, and the error has no preferred direction). The spread of the log-probabilities of given
  tokens is the same, whatever they are normalized by.

This is a statement about root mean squares: that of many log-probabilities must keep within. Errors of rounding are
taken to be independent, see Higham and Mary, "A New Approach to Probabilistic Rounding Error Analysis" (2019).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

UNITS = {"bfloat16": 2**-7, "float32": 2**-23}
CREST = 4.0  # largest magnitude of a row of activations over its root mean square
TIE = 3.0  # standard deviations of the difference of two log-probabilities


def ask(
    llm: Any, config: Mapping[str, Any], prompts: Sequence[str] | Sequence[list[int]], max_tokens: int, **options: Any
) -> dict[str, Any]:
    """What a model that vLLM serves says after some prompts, and how probable it finds them.

    The log-probability of each token of a prompt is that of a request of its own, which ends before it: vLLM 0.32 fails
    on `prompt_logprobs` of several prompts where adapters may be served.

    Args:
        llm: vLLM's `LLM`.
        config: the checkpoint's config.json.
        prompts: as texts or token ids, at least one of two tokens.
        max_tokens: greedy tokens after each prompt.
        options: of `LLM.generate`, such as `lora_request`.

    Returns:
        What `difference` takes, to be written as JSON: `outputs`, per prompt `token_ids`, `text` (None without a
        tokenizer), `given` (log-probabilities of the prompt's tokens but the first), `best` (pairs of a token and its
        log-probability, for each token of `token_ids` the 20 most probable ones); and `relative_error`.
    """
    from vllm import SamplingParams

    has_tokenizer = not llm.model_config.skip_tokenizer_init
    inputs = [prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=has_tokenizer, logprobs=20)
    answers = llm.generate(inputs, greedy, use_tqdm=False, **options)

    beginnings, nexts = [], []
    for answer in answers:
        tokens = list(answer.prompt_token_ids)
        beginnings += [{"prompt_token_ids": tokens[:end]} for end in range(1, len(tokens))]
        nexts += tokens[1:]
    one_token = [
        SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprob_token_ids=[token]) for token in nexts
    ]
    scored = llm.generate(beginnings, one_token, use_tqdm=False, **options)
    given = iter([answer.outputs[0].logprobs[0][token].logprob for answer, token in zip(scored, nexts, strict=True)])
    return {
        "outputs": [
            {
                "token_ids": list(answer.outputs[0].token_ids),
                "text": answer.outputs[0].text if has_tokenizer else None,
                "given": [next(given) for _ in answer.prompt_token_ids[1:]],
                "best": [
                    [[token, entry.logprob] for token, entry in position.items()]
                    for position in answer.outputs[0].logprobs
                ],
            }
            for answer in answers
        ],
        "relative_error": relative_error(config, str(llm.model_config.dtype).removeprefix("torch.")),
    }


def relative_error(config: Mapping[str, Any], dtype: str) -> float:
    """Of the logits of two servings, as a part of their spread; see the module's description.

    Args:
        config: config.json of a decoder.
        dtype: of activations, "bfloat16" or "float32".
    """
    layers = config["num_hidden_layers"]
    shares = sum(1 / layer for layer in range(1, layers + 1))
    roundings = 16 * shares + 2 * layers
    if dtype == "float32":
        roundings *= max(config["hidden_size"], config["intermediate_size"])
    squares = roundings * UNITS[dtype] ** 2 / 3
    groups = (config.get("quantization_config") or {}).get("config_groups") or {}
    if any(group.get("input_activations") for group in groups.values()):
        squares += 4 * shares * (CREST / 127) ** 2 / 3
    return math.sqrt(2 * squares)


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """Where two servings of a model differ by more than rounding can explain: a sentence, or None.

    Compared are the log-probabilities of given tokens, those of generated tokens as long as all tokens before are the
    same, and generated tokens. These may differ where two are tied: where `one` prefers its token to that of
    `other` by no more than what rounding does to the difference of two log-probabilities. What follows is another text.

    Args:
        one, other: of `ask`, for the same prompts. `best` of `other` may be missing.
    """
    given = [logprob for output in one["outputs"] for logprob in output["given"]]
    bound = max(one["relative_error"], other["relative_error"]) * statistics.pstdev(given)
    pairs = list(zip(given, [logprob for output in other["outputs"] for logprob in output["given"]], strict=True))
    if sentence := _beyond(bound, "given", pairs):
        return sentence
    pairs, tie = [], TIE * math.sqrt(2) * bound
    for number, (a, b) in enumerate(zip(one["outputs"], other["outputs"], strict=True)):
        for position, (token, found) in enumerate(zip(a["token_ids"], b["token_ids"], strict=False)):
            best = dict(a["best"][position])
            if "best" in b:
                pairs += [(best[key], logprob) for key, logprob in b["best"][position] if key in best]
            if token != found:
                margin = best[token] - best.get(found, -math.inf)
                if not margin <= tie:
                    return (
                        f"after prompt {number}, token {position} is {found} instead of {token}, which is {margin:.3g} "
                        f"nats more probable, and a tie is within {tie:.3g}"
                    )
                break
        else:
            if len(a["token_ids"]) != len(b["token_ids"]):
                return f"after prompt {number}, there are {len(b['token_ids'])} tokens, not {len(a['token_ids'])}"
    return _beyond(bound, "generated", pairs)


def _beyond(bound: float, what: str, pairs: Sequence[tuple[float, float]]) -> str | None:
    error = math.sqrt(statistics.fmean((a - b) ** 2 for a, b in pairs)) if pairs else 0.0
    if error <= bound:
        return None
    return (
        f"the log-probabilities of {len(pairs)} {what} tokens differ by {error:.3g} nats in the root mean square, and "
        f"rounding explains {bound:.3g}"
    )
