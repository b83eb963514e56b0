"""The page of ``scripts/studio``: makes pictures in the browser, with the engine in its own process. Needs Gradio."""
