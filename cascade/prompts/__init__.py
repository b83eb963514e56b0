"""Prompts as ComfyUI reads them: weights, more than 77 tokens, textual-inversion embeddings.

    parsing       brackets -> parts of the text with a weight each
    pieces        a part -> tokens, and the vectors of the embeddings that it names
    chunks        pieces -> chunks of 77 tokens, as many as the text encoder takes at once
    reading       these three in their order: a prompt -> chunks
    embeddings    the embedding files of a model folder
    conversion    embedding files that are pickles -> safetensors
    encoding      chunks -> hidden states, weighted
    text          TextEmbeddings, and how texts of unlike lengths share a batch

This folder knows only texts and tensors. The only network that it uses is the text encoder, which `encoding` calls.
"""
