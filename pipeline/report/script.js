// Points at the same step in all charts, and prints their values.
const charts = [...document.querySelectorAll("figure.chart")].flatMap(figure => {
  const data = figure.querySelector("script");
  if (!data) return [];
  return [{ plot: figure.querySelector(".plot"), cursor: figure.querySelector(".cursor"),
            output: figure.querySelector("output"), ...JSON.parse(data.textContent) }];
});
const nearest = (steps, step) => {
  let low = 0, high = steps.length - 1;
  while (low < high) { const half = (low + high) >> 1; if (steps[half] < step) low = half + 1; else high = half; }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
};
const show = step => charts.forEach(({ cursor, output, series, last }) => {
  cursor.hidden = step === null;
  if (step === null) return;
  cursor.style.left = 100 * step / last + "%";
  cursor.classList.toggle("late", step > last * 0.5);
  const at = "step " + Math.round(step) + ":", many = series.length > 2;
  const values = series.map(([steps, values, name]) => values[nearest(steps, step)] + (many ? "  " + name : ""));
  output.textContent = many ? [at, ...values].join("\n") : at + " " + values.join(", ");  // in the order of the legend
});
charts.forEach(({ plot, last }) => {
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    show(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * last);
  });
  plot.addEventListener("pointerleave", () => show(null));
});
