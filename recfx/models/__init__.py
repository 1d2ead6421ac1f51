"""Models: `init(config, generator) -> Params` and `forward(params, emb, dense) -> logit`."""
