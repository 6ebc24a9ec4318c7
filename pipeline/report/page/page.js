// The acceptance map's box: what a token's title says, on hover, keyboard focus or tap. Without it the titles remain.
"use strict";
(() => {
  const box = document.createElement("div");
  box.id = "token-box";
  box.setAttribute("role", "tooltip");
  box.hidden = true;
  document.body.append(box);
  let shown = null;

  const line = (text) => {
    const [name, value] = text.split("\t");
    const row = document.createElement("div");
    row.append(Object.assign(document.createElement("span"), { textContent: name }));
    if (value !== undefined) row.append(Object.assign(document.createElement("span"), { textContent: value }));
    else row.className = "heading";
    return row;
  };

  const place = (token) => {
    const at = token.getClientRects()[0];
    if (!at) return;
    const width = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(at.left, width - box.offsetWidth - 8));
    const below = at.bottom + 6 + box.offsetHeight < innerHeight || at.top < box.offsetHeight + 6;
    box.style.left = `${left}px`;
    box.style.top = `${below ? at.bottom + 6 : at.top - box.offsetHeight - 6}px`;
  };

  const hide = () => {
    if (!shown) return;
    shown.classList.remove("shown");
    shown.removeAttribute("aria-describedby");
    box.hidden = true;
    shown = null;
  };

  const show = (token) => {
    if (token === shown) return;
    hide();
    if (token.title) {
      token.dataset.about = token.title; // or the browser would show its own box as well
      token.removeAttribute("title");
    }
    box.replaceChildren(...token.dataset.about.split("\n").map(line));
    token.classList.add("shown");
    token.setAttribute("aria-describedby", box.id);
    box.hidden = false;
    place(token);
    shown = token;
  };

  const tokenOf = (event) => event.target.closest?.("p.tokens > .t");

  // One stop per response for the tabulator key; arrows go on from there.
  const stop = (token) => {
    for (const other of token.parentElement.querySelectorAll("[tabindex='0']")) other.tabIndex = -1;
    token.tabIndex = 0;
  };
  for (const tokens of document.querySelectorAll("p.tokens")) if (tokens.firstElementChild) stop(tokens.firstElementChild);

  const moves = {
    ArrowRight: (token) => token.nextElementSibling,
    ArrowLeft: (token) => token.previousElementSibling,
    Home: (token) => token.parentElement.firstElementChild,
    End: (token) => token.parentElement.lastElementChild,
  };
  document.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token) show(token);
    else if (event.pointerType === "mouse" && !box.contains(event.target)) hide();
  });
  document.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token) show(token);
    else hide();
  });
  document.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token) show(token);
    else hide();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const token = tokenOf(event);
    const next = token && moves[event.key]?.(token);
    if (!next) return;
    event.preventDefault();
    stop(next);
    next.focus();
  });
  addEventListener("scroll", () => shown && place(shown), { passive: true, capture: true });
})();
