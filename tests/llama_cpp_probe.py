"""Asks llama.cpp about a GGUF file; run by a Python that has llama-cpp-python, which need not have anything else.

    PYTHON llama_cpp_probe.py FILE.gguf < '{"texts": [...], "add_bos": true, "prompts": [[...]], "num_new": 8}'

Prints the ids of each text, the ids of all tokens that end an answer, and for each prompt (ids) the logits of its
positions and the greedy continuation.
"""

import json
import sys

import llama_cpp


def main() -> None:
    asked = json.load(sys.stdin)
    model = llama_cpp.Llama(
        sys.argv[1], n_ctx=512, n_threads=2, logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False
    )
    vocabulary = llama_cpp.llama_model_get_vocab(model.model)
    ids = [model.tokenize(text.encode(), add_bos=asked["add_bos"], special=True) for text in asked["texts"]]
    ends = [token for token in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, token)]
    logits, greedy = [], []
    for prompt in asked["prompts"]:
        model.reset()
        model.eval(prompt)
        logits.append(model.scores[: len(prompt)].tolist())
        continuation: list[int] = []
        while len(continuation) < asked["num_new"]:
            continuation.append(int(model.scores[model.n_tokens - 1].argmax()))
            model.eval(continuation[-1:])
        greedy.append(continuation)
    json.dump({"ids": ids, "ends": ends, "logits": logits, "greedy": greedy}, sys.stdout)


if __name__ == "__main__":
    main()
