(() => {
  const root = document.documentElement;
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const setTheme = (dark) => root.setAttribute("data-theme", dark ? "dark" : "light");
  setTheme(prefersDark.matches);

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const themed = () => ({
    "font.color": colour("--text"),
    "paper_bgcolor": colour("--card"),
    "plot_bgcolor": colour("--card"),
    "xaxis.gridcolor": colour("--line"),
    "yaxis.gridcolor": colour("--line"),
    "hoverlabel.bgcolor": colour("--page"),
    "hoverlabel.font.color": colour("--text"),
    "hoverlabel.bordercolor": colour("--line"),
  });

  const plots = [];
  for (const source of document.querySelectorAll("script[data-plot]")) {
    const plot = document.getElementById(source.dataset.plot);
    const { data, layout } = JSON.parse(source.textContent);
    layout.xaxis.nticks = Math.max(4, Math.round(plot.clientWidth / 90));
    const config = {
      responsive: true,
      displaylogo: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "toImage"],
    };
    plots.push(Plotly.newPlot(plot, data, layout, config).then(() => {
      const legend = plot.querySelector(".legend")?.getBoundingClientRect().height ?? 0;
      return Plotly.relayout(plot, { ...themed(), height: layout.height + Math.max(0, legend - 30) });
    }));
  }
  Promise.all(plots).then(() => root.setAttribute("data-ready", ""));

  const repaint = () => document.querySelectorAll(".plot").forEach((plot) => Plotly.relayout(plot, themed()));
  document.getElementById("theme").addEventListener("click", () => {
    setTheme(root.getAttribute("data-theme") !== "dark");
    repaint();
  });
  prefersDark.addEventListener("change", (event) => { setTheme(event.matches); repaint(); });

  for (const button of document.querySelectorAll("button[data-figure]")) {
    button.addEventListener("click", () => {
      const { figure, format } = button.dataset;
      Plotly.downloadImage(figure, { format, filename: figure, width: 1000, height: Math.max(560, document.getElementById(figure).clientHeight), scale: format === "png" ? 2 : 1 });
    });
  }
})();
