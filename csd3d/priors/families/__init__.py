"""The kinds of diffusion model, one a file: how each is recognised, opened, told a prompt and asked for the noise.

A family is registered by `@register("family", name, title=...)` and has

    parts                       the class of every network and tokenizer by its folder: what is downloaded and opened
    matches(folder) -> bool     whether a folder is of its kind, by configs alone: the weights may not be there yet
    check(folder)               may be left out: InputError in one line where the configs say that it cannot be opened
    load(folder, options)       the `Prior`; InputError in one line where parts are missing, broken or do not fit

Nothing else in csd3d knows a family by its name. A family from outside is registered in the same way, by a plugin.
"""
