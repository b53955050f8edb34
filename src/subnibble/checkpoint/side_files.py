"""Copy the files that a packed model needs besides its weights: tokenizer, chat templates, generation config."""

from __future__ import annotations

from pathlib import Path

from subnibble.errors import CheckpointError

# The folder of chat templates other than the default one.
TEMPLATE_FOLDER = "additional_chat_templates"
# Names that transformers and model makers use. Python code is never copied.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "chat_template.jinja",
    "chat_template.json", f"{TEMPLATE_FOLDER}/*.jinja", "processor_config.json", "preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip


def copy_side_files(source: Path, target: Path) -> None:
    """Copy the side files that exist in `source` to `target`, both model folders.

    Raises `CheckpointError` if a file cannot be read.
    """
    for file in (file for pattern in SIDE_FILES for file in sorted(source.glob(pattern)) if file.is_file()):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}); make it readable") from error
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)
