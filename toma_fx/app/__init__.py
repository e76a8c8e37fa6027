"""``toma-fx app``: a page in the browser that draws an image untouched and merged, side by side.

`compare` draws, `kept` records the tokens that stay, and `words` writes sentences and code. None of
these needs Gradio. `page` builds the page, and `command` starts it.
"""
