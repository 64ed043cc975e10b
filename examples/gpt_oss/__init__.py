"""gpt-oss on moe_jax: model, checkpoint loading, chat format, generation and serving."""
