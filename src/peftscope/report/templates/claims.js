const form = document.querySelector(".filters");
const claims = [...document.querySelectorAll("details")];
function filter() {
  const wanted = Object.fromEntries(new FormData(form));
  let shown = 0;
  for (const claim of claims) {
    const fits = (!wanted.section || claim.dataset.section === wanted.section)
      && (!wanted.verdict || claim.dataset.verdict === wanted.verdict)
      && (!wanted.kind || claim.dataset.kind.split(" ").includes(wanted.kind));
    claim.hidden = !fits;
    shown += fits;
  }
  for (const section of document.querySelectorAll("section"))
    section.hidden = ![...section.querySelectorAll("details")].some(claim => !claim.hidden);
  form.querySelector("output").textContent = `${shown} of ${claims.length} claims`;
}
form.hidden = false;
form.addEventListener("change", filter);
filter();
const linked = document.getElementById(location.hash.slice(1));
if (linked && linked.open !== undefined) linked.open = true;
