"""Models: `init(config, generator) -> Params` or (Params, statistics), and `forward(params, emb, feats) -> logit`.

Of one task: `lr`, `fm`, `fwfm`, `wide_deep`, `deepfm`, `dcnv2`, `dlrm`, `autoint`, `masknet`, `finalmlp`, `finalnet`.
Of several tasks: `shared_bottom`, `mmoe`, `ple`, `esmm`. Of histories: `din`, `sasrec`; for retrieval: `two_tower`.
Each module has its formula and its paper.
"""
