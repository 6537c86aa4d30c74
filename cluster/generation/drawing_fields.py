"""The options that only a model that draws listens to."""

#: Fields of a request that are refused with --t2i null, and that a preset does not set then.
DRAWING_FIELDS = (
    "t2i_variant", "t2i_without", "t2i_config", "lora", "vae", "pipeline_options", "steps", "guidance_scale", "width",
    "height", "scheduler", "scheduler_options", "negative_prompt", "prompt_template", "max_attempts", "batch_size",
    "attention", "channels_last", "compile", "vae_slicing", "vae_tiling", "prompt_cache", "offload",
)  # fmt: skip
