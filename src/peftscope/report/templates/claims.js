const form = document.querySelector(".filters");
const claims = [...document.querySelectorAll("details")];
const said = new Map();
const saying = claim => said.get(claim) ?? said.set(claim, claim.textContent.toLowerCase()).get(claim);
function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  const words = wanted.words.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const claim of claims) {
    const fits = ["source", "topic", "verdict", "kind", "world"]
      .every(name => !wanted[name] || claim.dataset[name].split("|").includes(wanted[name]))
      && words.every(word => claim.id.toLowerCase() === word || saying(claim).includes(word));
    claim.hidden = !fits;
    shown += fits;
  }
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector("details:not([hidden])");
  form.querySelector("output").textContent = `${shown} of ${claims.length} claims`;
}
function open() {
  const linked = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (linked?.tagName !== "DETAILS") return;
  if (linked.hidden) { form.reset(); filter(); }
  linked.open = true;
  linked.scrollIntoView();
}
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());
addEventListener("hashchange", open);
addEventListener("keydown", event => {
  const field = form.elements.words;
  if (event.key === "/" && !event.target.closest("input, select")) { event.preventDefault(); field.focus(); }
});
open();
