"""Where flash_attn keeps what its models generate with."""
