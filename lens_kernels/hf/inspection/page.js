// Arrow keys move within a table. Only one cell is a tab stop, so that Tab leaves the table.
const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const detail = document.getElementById("detail");
const show = (e) => {
  const cell = e.target.closest(".lens td");
  if (cell) detail.textContent = cell.dataset.detail;
};
document.addEventListener("mouseover", show);
document.addEventListener("focusin", show);
document.addEventListener("click", (e) => e.target.closest(".lens td")?.focus());
document.addEventListener("keydown", (e) => {
  const cell = e.target.closest(".lens td");
  const [down, right] = STEPS[e.key] ?? [0, 0];
  if (!cell || !(down || right)) return;
  e.preventDefault();
  const body = cell.closest("tbody");
  const row = body.rows[cell.parentNode.sectionRowIndex + down];
  const next = row?.cells[cell.cellIndex + right];
  if (next?.tagName !== "TD") return;
  body.querySelector("td[tabindex='0']").tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
