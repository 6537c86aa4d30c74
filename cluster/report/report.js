"use strict";
// Conveniences only: without this script everything is there to read.

// A picture opens large, with its seed and what draws it again.
const dialog = document.createElement("dialog");
const figure = dialog.appendChild(document.createElement("figure"));
const close = dialog.appendChild(document.createElement("button"));
close.textContent = "Close";
close.addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
document.body.append(dialog);

const cards = [...document.querySelectorAll(".picture")].filter((card) => card.querySelector("img"));
let shown = 0;
function show(number) {
  shown = (number + cards.length) % cards.length;
  const card = cards[shown];
  figure.replaceChildren(card.querySelector("img").cloneNode(), card.querySelector("figcaption").cloneNode(true));
  if (card.dataset.redraw) {
    figure.lastChild.appendChild(document.createElement("code")).textContent = card.dataset.redraw;
  }
  if (!dialog.open) dialog.showModal();
}
dialog.addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") show(shown + 1);
  if (event.key === "ArrowLeft") show(shown - 1);
});
cards.forEach((card, number) => {
  const image = card.querySelector("img");
  image.classList.add("zoomable");
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => show(number));
  image.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); show(number); }
  });
});

// Concepts: one at a time, or all.
const concepts = [...document.querySelectorAll(".concept")];
if (concepts.length > 1) {
  const filter = document.createElement("div");
  filter.className = "filter";
  const choose = (name) => {
    for (const concept of concepts) concept.hidden = name !== null && concept.dataset.concept !== name;
    for (const button of filter.children) button.setAttribute("aria-pressed", String(button.value === (name ?? "")));
  };
  for (const name of [null, ...concepts.map((concept) => concept.dataset.concept)]) {
    const button = filter.appendChild(document.createElement("button"));
    button.type = "button";
    button.value = name ?? "";
    button.textContent = name ?? "all";
    button.addEventListener("click", () => choose(name));
  }
  concepts[0].before(filter);
  choose(concepts[0].dataset.concept);
}

// The contents say where one is.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -75% 0px" });
for (const section of document.querySelectorAll("main > section")) seen.observe(section);
