"use strict";
// Answers: search, and one page of rows at a time. Without scripts all rows are shown.
for (const box of document.querySelectorAll("[data-answers]")) {
  const rows = [...box.querySelectorAll("tr[data-row]")], size = 10, bar = box.querySelector(".bar");
  const find = bar.querySelector("input"), where = bar.querySelector("[data-where]");
  let page = 0;
  const show = () => {
    const words = find.value.toLowerCase();
    const found = rows.filter((row) => row.textContent.toLowerCase().includes(words));
    const pages = Math.max(Math.ceil(found.length / size), 1);
    page = Math.min(Math.max(page, 0), pages - 1);
    rows.forEach((row) => { row.hidden = true; });
    found.slice(page * size, (page + 1) * size).forEach((row) => { row.hidden = false; });
    where.textContent = `page ${page + 1} of ${pages}, ${found.length} of ${rows.length} prompts`;
  };
  bar.hidden = false;
  find.addEventListener("input", () => { page = 0; show(); });
  bar.querySelector("[data-back]").addEventListener("click", () => { page -= 1; show(); });
  bar.querySelector("[data-on]").addEventListener("click", () => { page += 1; show(); });
  show();
}
// Tokens: coloured by KL or by who drew them.
for (const box of document.querySelectorAll("[data-samples]")) {
  const choice = box.querySelector("select");
  if (!choice) continue;
  const colour = () => box.classList.toggle("by-teacher", choice.value === "teacher");
  choice.parentElement.parentElement.hidden = false;
  choice.addEventListener("change", colour);
  colour();
}
