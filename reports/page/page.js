"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // The switch of the axis: every section that has the chosen axis shows it.
  const show = (axis) => {
    for (const section of all("section")) {
      const choice = all(".switch input", section).find((input) => input.value === axis);
      if (!choice) continue;
      choice.checked = true;
      for (const panel of all("[data-panel]", section)) {
        panel.hidden = panel.dataset.panel !== axis;
      }
    }
  };
  for (const input of all(".switch input")) {
    input.addEventListener("change", () => show(input.value));
  }

  // The numbers of a mark: on hover, tap and focus. Arrow keys go from mark to mark.
  const tip = document.getElementById("tip");
  const hide = () => { tip.hidden = true; };
  const reveal = (mark) => {
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    const left = at.left + at.width / 2 - tip.offsetWidth / 2;
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, Math.min(left, room))}px`;
    tip.style.top = `${above < 8 ? at.bottom + 6 : above}px`;
  };
  const charts = all("svg.plot, svg.track").map((chart) => all(".mark", chart));
  for (const marks of charts) {
    if (marks.length) marks[0].setAttribute("tabindex", "0");
    marks.forEach((mark, place) => {
      const title = mark.querySelector("title");
      mark.dataset.tip = title.textContent;
      mark.setAttribute("aria-label", title.textContent.replaceAll("\n", ", "));
      title.remove();
      mark.addEventListener("pointerenter", () => reveal(mark));
      mark.addEventListener("pointerleave", hide);
      mark.addEventListener("focus", () => reveal(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("click", () => mark.focus());
      mark.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") hide();
        if (!step) return;
        event.preventDefault();
        marks[(place + step + marks.length) % marks.length].focus();
      });
    });
  }
  addEventListener("scroll", hide, { passive: true });

  // The key lights lines up: while the pointer is on a name, and until the next click on it.
  const keys = all(".key button");
  const light = (passing) => {
    const lit = new Set(keys.filter((key) => key.getAttribute("aria-pressed") === "true")
      .map((key) => key.dataset.method));
    if (passing) lit.add(passing);
    for (const chart of all("svg.plot")) chart.classList.toggle("dim", lit.size > 0);
    for (const line of all(".series")) {
      line.classList.toggle("lit", [...line.classList].some((name) => lit.has(name)));
    }
  };
  for (const key of keys) {
    key.addEventListener("pointerenter", () => light(key.dataset.method));
    key.addEventListener("pointerleave", () => light());
    key.addEventListener("click", () => {
      const pressed = key.getAttribute("aria-pressed") === "true";
      key.setAttribute("aria-pressed", String(!pressed));
      light();
    });
  }

  // Tables: a click on a header sorts, the next one reverses. Missing values come last.
  const number = (cell) => (cell.dataset.value === undefined ? null : Number(cell.dataset.value));
  const compare = (a, b) => {
    const x = number(a), y = number(b);
    if (x !== null && y !== null) return x - y;
    return a.textContent.localeCompare(b.textContent, "en", { numeric: true });
  };
  const missing = (cell) => cell.dataset.value === undefined && cell.textContent === "-";
  const sort = (head) => {
    const column = head.cellIndex, body = head.closest("table").tBodies[0];
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const rows = [...body.rows].sort((p, q) => {
      const a = p.cells[column], b = q.cells[column];
      if (missing(a) !== missing(b)) return missing(a) ? 1 : -1;
      return sign * compare(a, b);
    });
    body.append(...rows);
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  };
  for (const button of all("th button")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }

  // A link into a folded part unfolds it; paper has all parts but the long ones.
  const unfold = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const folded = target && target.closest("details");
    if (!folded) return;
    folded.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", unfold);
  unfold();
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open], .long)");
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of closed) one.open = false;
  });
})();
