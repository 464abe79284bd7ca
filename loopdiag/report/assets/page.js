"use strict";
// Says of a token what each exit said: on hover, tap, focus and the arrow keys. All text goes in as text.
const seen = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

for (const view of document.querySelectorAll(".tokens")) {
  const told = JSON.parse(view.querySelector("script").textContent);
  const inspector = view.querySelector(".inspector");
  const texts = [...view.querySelectorAll(".text")];
  let chosen = null;

  const loop = () => Number(view.querySelector("input[name^=loop]:checked").value);

  function tell() {
    if (!chosen) return;
    const { nll, top } = told.documents[texts.indexOf(chosen.parentElement)];
    const token = [...chosen.parentElement.children].indexOf(chosen);
    const after = told.loops.indexOf(loop());
    const [was, is] = [nll[after - 1][token], nll[after][token]];
    const heading = element("p");
    heading.append(element("code", seen(chosen.textContent) || "part of a character"));
    if (was === null || is === null) {
      inspector.replaceChildren(heading, element("p", token ? "Its NLL is not finite." : "The first token is given."));
      return;
    }
    const change = is - was;
    const marks = chosen.className.toLowerCase().split(" "); // the colour and the word are one decision
    const kind = marks.includes(`h${loop()}`) ? "helped" : marks.includes(`b${loop()}`) ? "harmed" : "unchanged";
    const signed = (change < 0 ? "−" : "+") + Math.abs(change).toFixed(2);
    const which = `loop ${loop()}: NLL ${was.toFixed(2)} → ${is.toFixed(2)} (${signed} nats, ${kind})`;
    heading.append(" ", element("b", which));
    const likeliest = element("p", "likeliest there: ");
    likeliest.append(element("code", seen(top[after - 1][token])), " → ", element("code", seen(top[after][token])));
    const table = element("table");
    const rows = [element("tr"), element("tr"), element("tr")];
    ["exit", "NLL", "likeliest"].forEach((name, row) => rows[row].append(element("th", name)));
    told.loops.forEach((number, place) => {
      const mark = place === after ? "after" : place === after - 1 ? "before" : "";
      const value = nll[place][token];
      rows[0].append(element("th", String(number), mark));
      rows[1].append(element("td", value === null ? "–" : value.toFixed(2), mark));
      rows[2].append(element("td", seen(top[place][token]), mark));
    });
    table.append(...rows);
    const scroll = element("div", undefined, "scroll");
    scroll.append(table);
    inspector.replaceChildren(heading, likeliest, scroll);
  }

  function choose(token) {
    if (chosen) {
      chosen.classList.remove("chosen");
      chosen.removeAttribute("tabindex");
    }
    chosen = token;
    chosen.classList.add("chosen");
    chosen.tabIndex = 0;
    tell();
  }

  for (const text of texts) {
    if (text.children.length) text.children[0].tabIndex = 0;
    // Not pointerover: a page that scrolls under a pointer at rest chooses nothing.
    for (const kind of ["pointermove", "focusin", "click"]) {
      text.addEventListener(kind, (event) => {
        const token = event.target.closest(".text > span");
        if (token && token !== chosen) choose(token);
      });
    }
    text.addEventListener("keydown", (event) => {
      const next = { ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling" }[event.key];
      const to = next && event.target[next];
      if (to) {
        event.preventDefault();
        choose(to);
        to.focus();
      }
    });
  }
  view.addEventListener("change", (event) => {
    if (event.target.name.startsWith("document") && chosen) {
      chosen.classList.remove("chosen");
      chosen = null;
      inspector.replaceChildren();
    }
    tell();
  });
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.activeElement) document.activeElement.blur();
});
