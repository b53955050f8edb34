"""What lies beside a model's weights and goes with it into a packed folder, so that it speaks like the original."""

from __future__ import annotations

from pathlib import Path

from subnibble.errors import CheckpointError

# Of chat templates beside the default one.
TEMPLATE_FOLDER = "additional_chat_templates"
# As transformers and the makers of models name them. Code is not among them.
SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "chat_template.jinja",
    "chat_template.json", f"{TEMPLATE_FOLDER}/*.jinja", "processor_config.json", "preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip


def copy_side_files(source: Path, target: Path) -> None:
    """Copy them, as far as the source has them."""
    for file in (file for pattern in SIDE_FILES for file in sorted(source.glob(pattern)) if file.is_file()):
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}); it goes with the model") from error
        copy = target / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(content)
