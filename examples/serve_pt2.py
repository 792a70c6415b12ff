"""A model with swappable adapters as one file, served by a C++ program without Python, and by five lines of Python.

A tiny Llama with random weights is exported; three random adapters are saved as PEFT saves them; `serve_pt2.cpp` is
compiled with the libtorch that torch brings, loads the file and the adapters, and answers batches in which each row has
an adapter of its own. Its answers are compared, bit for bit, with those of the model that is compiled here. It takes
about a minute, most of it for two compilers. Run it with `python examples/serve_pt2.py`.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim
from transformers import LlamaConfig, LlamaForCausalLM

import xpu_lora_compile as xlc
from xpu_lora_compile.kernels import compiled

VOICES = {"pirate": 4, "terse": 8, "formal": 2}
BATCHES: list[list[str | None]] = [["pirate", None, "terse"], ["formal", "pirate"], [None, "terse", "formal", "formal"]]
LENGTH, VOCABULARY, MODULES = 12, 96, r".*(proj|lm_head)"
SOURCE = Path(__file__).with_suffix(".cpp")


def tiny_llama() -> LlamaForCausalLM:
    """Return a Llama of two layers, with the same random weights each time."""
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads, use_cache=False))
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def save_voices(folder: Path) -> None:
    """Have PEFT save an adapter with random weights for each voice."""
    for seed, (name, rank) in enumerate(VOICES.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj", "down_proj"])
        peft_model = get_peft_model(tiny_llama(), config)
        for parameter_name, parameter in peft_model.named_parameters():
            if "lora_" in parameter_name:
                nn.init.normal_(parameter, std=0.5)
        peft_model.save_pretrained(str(folder / name))


def make_artifact(model: nn.Module, path: Path) -> Path:
    """Export a model for any number of sequences of one length."""
    tokens = torch.randint(0, VOCABULARY, (3, LENGTH)).to(next(model.parameters()).device)
    return xlc.export(
        model, path, kwargs={"input_ids": tokens}, dynamic_shapes={"input_ids": {0: Dim("batch", max=64)}}
    )


def make_program(path: Path, source: Path = SOURCE) -> Path:
    """Compile `serve_pt2.cpp`, or another source, with the libtorch of this process."""
    package, libtorch = Path(xlc.__file__).parent, Path(torch.__file__).parent
    headers = [libtorch / "include", libtorch / "include/torch/csrc/api/include", package / "artifacts"]
    includes = [part for folder in headers for part in ("-isystem", str(folder))]
    names = ["torch", "torch_cpu", "c10", *(["torch_cuda", "c10_cuda"] if torch.cuda.is_available() else [])]
    # The program calls nothing of torch_cuda itself, and would be linked without it.
    linked = ["-Wl,--no-as-needed", f"-L{libtorch / 'lib'}", f"-Wl,-rpath,{libtorch / 'lib'}"]
    linked += [f"-l{name}" for name in (*names, "dl")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    compiler = compiled.found_compiler()
    linked += compiled.cxx_library(compiler)
    command = [*compiler, "-std=c++20", "-O1", abi, *includes, str(source), "-o", str(path), *linked]
    subprocess.run(command, check=True)  # noqa: S603 - the machine's own compiler
    return path


def run_program(
    program: Path, artifact: Path, plan: list[dict[str, Any]], tensors: dict[str, Tensor]
) -> tuple[int, str]:
    """Have the C++ program take the steps of a plan; return its exit status and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        plan_file, tensor_file = Path(folder) / "plan.json", Path(folder) / "tensors.safetensors"
        plan_file.write_text(json.dumps(plan))
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, tensor_file)
        command = [str(program), str(artifact), str(plan_file), str(tensor_file)]
        done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603 - compiled above
    return done.returncode, (done.stdout + done.stderr).strip()


def batch_of(rows: Sequence[str | None]) -> Tensor:
    """Return random tokens, a sequence for each row."""
    return torch.randint(0, VOCABULARY, (len(rows), LENGTH))


def main() -> int:
    """Export, compile, serve; 0 if no row is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_voices(folder)
        model = tiny_llama()
        bank = xlc.attach(model, slots=4, max_rank=8, target_modules=MODULES)
        artifact = make_artifact(model, folder / "served.pt2")
        print(f"exported: {artifact.stat().st_size / 1e6:.1f} MB")
        return serve(model, bank, artifact, make_program(folder / "serve_pt2"), folder)


def serve(model: nn.Module, bank: xlc.AdapterBank, artifact: Path, program: Path, folder: Path) -> int:
    """Answer the batches three times: here, by the artifact in Python, and by the C++ program."""
    served = xlc.load_artifact(artifact)
    plan: list[dict[str, Any]] = []
    for voice in VOICES:
        served.load(voice, folder / voice)
        bank.load(voice, folder / voice)
        plan.append({"load": [voice, str(folder / voice)]})
    here = torch.compile(model, backend="xpu_lora")
    tensors: dict[str, Tensor] = {}
    wrong = 0
    for number, rows in enumerate(BATCHES):
        tokens = batch_of(rows)
        with torch.no_grad(), bank.use(rows):
            logits = here(input_ids=tokens).logits
        answer = served(input_ids=tokens, adapters=rows)["logits"]
        wrong += sum(not torch.equal(*pair) for pair in zip(answer, logits, strict=True))
        plan.append({"rows": rows})
        tensors |= {f"{number}.input_ids": tokens, f"{number}.logits": logits.contiguous()}
    print(f"Python: {wrong} rows wrong")
    status, said = run_program(program, artifact, plan, tensors)
    print(f"C++: {said}")
    return status or int(wrong > 0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    raise SystemExit(main())
