"""The kinds of diffusion model, one per file: how to recognise it, open it, embed a prompt and predict the noise.

A family is registered by `@register("family", name, title=...)` and has

    parts                       the class of each network and tokenizer by folder, to download and open: the class, or
                                its name ("diffusers.AutoencoderKL"), so that listing families imports no library
    matches(folder) -> bool     whether a folder holds such a model, by its configs: weights may not be downloaded yet
    check(folder)               optional: InputError in one line where the configs show that it cannot be opened
    check_options(folder, options)  optional: InputError for settings that it cannot do, before weights are fetched
    edits(folder) -> bool       optional: whether it is an editing model, by its configs; else known once it is open
    load(folder, options)       the `Prior`; InputError in one line where parts are missing, broken or do not fit

No other module of csd3d names a family. A plugin registers its own in the same way.
"""
