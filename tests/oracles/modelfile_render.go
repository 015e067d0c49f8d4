// modelfile_render.go MODELFILE: its TEMPLATE with the chat on stdin ([{"Role", "Content"}]), by Go's own text/template, as Ollama does.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

func main() {
	text, err := os.ReadFile(os.Args[1])
	if err != nil {
		panic(err)
	}
	source := strings.SplitN(strings.SplitN(string(text), "TEMPLATE \"\"\"", 2)[1], "\"\"\"", 2)[0]
	var messages []map[string]string
	if err := json.NewDecoder(os.Stdin).Decode(&messages); err != nil {
		panic(err)
	}
	values := map[string]any{"Messages": messages}
	if len(messages) > 0 {
		values["Prompt"] = messages[len(messages)-1]["Content"]
	}
	if err := template.Must(template.New("").Parse(source)).Execute(os.Stdout, values); err != nil {
		panic(err)
	}
}
