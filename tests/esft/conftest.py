from lora.run_fixtures import (  # noqa: F401
    base,
    bfloat16_base,
    run_files,
    sigterm_at,
)
