// The Vercel AI SDK through the local proxy: only the base URL is ours.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { streamText } from "ai";

const { VOUCHSAFE_PROXY = "http://127.0.0.1:8080", VOUCHSAFE_API_KEY, VOUCHSAFE_MODEL } = process.env;
const question = process.argv.slice(2).join(" ") || "What can the host see?";
const service = createOpenAICompatible({
  name: "vouchsafe",
  baseURL: `${VOUCHSAFE_PROXY}/v1`,
  apiKey: VOUCHSAFE_API_KEY,
});

try {
  const { fullStream } = streamText({
    model: service(VOUCHSAFE_MODEL),
    prompt: question,
    temperature: 0,
    onError: () => {}, // errors come as parts of the stream; by default each is printed whole, request and all
  });
  for await (const part of fullStream) { // not textStream: that one merely ends when something went wrong
    if (part.type === "text-delta") process.stdout.write(part.text);
    if (part.type === "error") throw part.error;
  }
  console.log();
} catch (error) {
  console.error(`error: ${error.message}`);
  process.exitCode = 1;
}
