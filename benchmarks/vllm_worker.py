"""vLLM as a contender of generate.py, in an environment of its own: a JSON request in, the number of new tokens out.

PYTHON benchmarks/vllm_worker.py MODEL_FOLDER DTYPE
"""

from __future__ import annotations

import json
import os
import sys

replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what vLLM prints is no reply


def main() -> None:
    """Answer until the input ends."""
    import vllm

    setting = {"max_model_len": 2048, "gpu_memory_utilization": 0.3, "disable_log_stats": True}  # a CPU's memory, too
    model = vllm.LLM(model=sys.argv[1], dtype=sys.argv[2], **setting)
    print(json.dumps(vllm.__version__), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        new = request["new"]
        sampling = vllm.SamplingParams(
            n=request["n"], top_p=request["top_p"], min_tokens=new, max_tokens=new, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        outputs = model.generate(prompts, sampling, use_tqdm=False)
        made = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        print(json.dumps(made), file=replies, flush=True)


if __name__ == "__main__":
    main()
