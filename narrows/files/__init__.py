"""Files: how one is written whole or not at all, a folder replaced, a stranger's file read.

Every file and folder that narrows leaves behind goes through `writing` or `folders`, and every one
that it takes from outside through `reading`. `quoting` is how a name becomes part of a text.
"""
