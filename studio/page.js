// What the page does by itself in the browser. Gradio calls this function once the page is there.
() => {
    // Escape cancels, wherever the focus is.
    document.addEventListener("keydown", event => {
        if (event.key === "Escape") document.querySelector("#cancel")?.click()
    })

    // An error takes the focus to its input, which may be outside the window: NAME-note stands below NAME.
    new MutationObserver(changes => {
        const added = changes.flatMap(change => [...change.addedNodes]).filter(node => node.nodeType === Node.ELEMENT_NODE)
        const error = added.map(node => node.matches(".error") ? node : node.querySelector(".error")).find(Boolean)
        const note = error?.closest("[id$=-note]")
        if (!note) return
        const input = document.getElementById(note.id.replace(/-note$/, ""))
        input?.querySelector("textarea, input:not([type=file]), button")?.focus()
        note.scrollIntoView({block: "nearest"})
    }).observe(document.body, {childList: true, subtree: true})

    window.studio = {
        // Make is hidden while a request runs, and so loses the keyboard's focus.
        keepFocus() {
            if (document.activeElement === document.body) document.querySelector("#make")?.focus()
        },
        // Scrolls to an input. Its fold may have been opened just now: its content comes some frames later.
        show(id, frames = 60) {
            const input = document.getElementById(id)
            if (input?.offsetHeight) input.scrollIntoView({block: "nearest"})
            else if (frames) requestAnimationFrame(() => window.studio.show(id, frames - 1))
        },
    }
}
