"""Where flash_attn keeps what its models are built of."""
