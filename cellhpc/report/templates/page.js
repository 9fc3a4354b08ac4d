"use strict";
(() => {
  /* Tables are sorted by a click on a heading: each body by itself, equal rows as they were. */
  const key = (row, column) => {
    const cell = row.cells[column];
    return cell ? cell.dataset.v ?? cell.textContent.trim() : "";
  };
  const sort = (table, heading) => {
    const column = heading.cellIndex;
    const keys = [...table.tBodies].flatMap((body) => [...body.rows].map((row) => key(row, column)));
    const numbers = keys.every((one) => one === "" || !Number.isNaN(Number(one)));
    const before = heading.getAttribute("aria-sort");
    const up = before ? before === "descending" : !numbers;
    table.querySelectorAll("th[aria-sort]").forEach((one) => one.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    for (const body of table.tBodies) {
      const rows = [...body.rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        const order = numbers ? a - b : a.localeCompare(b, "en", { numeric: true });
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
    }
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const heading of [...table.tHead.rows].at(-1).cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.title = "Sort by this column";
      button.addEventListener("click", () => sort(table, heading));
      heading.append(button);
    }
  }

  /* Compounds are filtered by words, in their index and in their sections. */
  for (const place of document.querySelectorAll("[data-filter]")) {
    const parts = place.closest("section").querySelectorAll("[data-words]");
    const words = document.createElement("input");
    words.type = "search";
    words.placeholder = place.dataset.filter;
    words.setAttribute("aria-label", place.dataset.filter);
    const wrong = document.createElement("input");
    wrong.type = "checkbox";
    const label = document.createElement("label");
    label.append(wrong, " only with a wrong call");
    const filter = () => {
      const wanted = words.value.trim().toLowerCase();
      for (const part of parts) {
        const fits = part.dataset.words.toLowerCase().includes(wanted);
        part.hidden = !fits || (wrong.checked && !("wrong" in part.dataset));
      }
    };
    words.addEventListener("input", filter);
    wrong.addEventListener("change", filter);
    place.append(words, label);
  }

  /* What a link points to is opened, and everything for print. */
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let part = target; part; part = part.parentElement) {
      if (part.tagName === "DETAILS") part.open = true;
    }
    target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
})();
