from lora.run_fixtures import (  # noqa: F401
    base,
    bfloat16_base,
    cheap_compilation,
    compiled_programs,
    run_files,
    sigterm_at,
)
