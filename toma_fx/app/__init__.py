"""``toma-fx app``: a page in the browser that draws an image untouched and merged, side by side.

`compare` draws, `kept` sees which tokens stay, `words` puts it into sentences and code, and none of
them needs Gradio. `page` builds the page, and `command` starts it.
"""
