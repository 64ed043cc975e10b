"""How the training data of gpt-oss-nano, the small checkpoint shipped here, is made.

`corpus` fetches and splits public-domain texts, `vocabulary` trains the byte-level BPE,
`passages`, `phrases`, `chat_maker` and `chats` turn the training texts into harmony chats, and
`prepare` writes everything to a folder.
"""
